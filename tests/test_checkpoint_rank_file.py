"""One rank file: what we write torch reads, what torch writes we read, and nothing else runs."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch

from modellink.checkpoint.chunks import LazyTensor
from modellink.checkpoint.rank_file import load_rank_file, save_rank_file
from modellink.checkpoint.stored_zip import ALIGNMENT
from modellink.checkpoint.unpickle import is_placeholder
from modellink.config.errors import ConfigError


def some_state() -> dict:
    shared = torch.randn(5, 3)
    return {
        "args": argparse.Namespace(
            hidden_size=24, params_dtype=torch.bfloat16, names=["a", None], shape=torch.Size([2])
        ),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": OrderedDict(
            half=torch.randn(4, 6).to(torch.bfloat16),
            column=torch.randn(6, 4).t(),
            slice=torch.arange(100)[10:20],
            scalar=torch.tensor(2.5),
            empty=torch.zeros(0, 3),
            parameter=torch.nn.Parameter(torch.randn(2)),
            again=shared,
            same=shared,
        ),
        "optimizer": {
            "state": {0: {"exp_avg": torch.randn(3).double(), "step": torch.tensor(3)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}],
        },
        "rng_state": [{"torch": torch.get_rng_state(), "numpy": numpy.random.get_state(), "on": {True, False}}],
    }


def assert_equal(left: object, right: object, path: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor) and left.dtype == right.dtype, path
        assert torch.equal(left.detach(), right.detach()), path
        assert left.shape == right.shape, path
    elif isinstance(left, numpy.ndarray):
        assert numpy.array_equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right)):
            assert_equal(a, b, f"{path}[{index}]")
    else:
        assert left == right, path


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_we_write(tmp_path: Path, mmap: bool) -> None:
    state = some_state()
    save_rank_file(tmp_path / "new" / "file.pt", state)
    assert_equal(state, torch.load(tmp_path / "new" / "file.pt", mmap=mmap, weights_only=False))


def test_weights_only_torch_reads_our_tensors(tmp_path: Path) -> None:
    state = {"model": some_state()["model"], "iteration": 3}
    save_rank_file(tmp_path / "file.pt", state)
    assert_equal(state, torch.load(tmp_path / "file.pt", weights_only=True))


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_we_read_what_torch_and_we_write(tmp_path: Path, mmap: bool, ours: bool) -> None:
    state = some_state()
    (save_rank_file(tmp_path / "file.pt", state) if ours else torch.save(state, tmp_path / "file.pt"))
    assert_equal(state, load_rank_file(tmp_path / "file.pt", mmap=mmap))


def test_lazy_tensors_are_fetched_one_at_a_time_and_records_are_aligned(tmp_path: Path) -> None:
    fetched = []

    def lazy(index: int) -> LazyTensor:
        def parts() -> list[torch.Tensor]:
            fetched.append(index)
            return [torch.full((2, 3), float(index)), torch.full((1, 3), -1.0)]

        return LazyTensor(f"t{index}", (3, 3), torch.bfloat16, 0, parts)

    state = {"model": {f"t{index}": lazy(index) for index in range(5)}}
    save_rank_file(tmp_path / "file.pt", state)
    assert fetched == [0, 1, 2, 3, 4]
    read = load_rank_file(tmp_path / "file.pt")["model"]
    for index in range(5):
        expected = torch.tensor([[index] * 3, [index] * 3, [-1] * 3], dtype=torch.bfloat16)
        assert torch.equal(read[f"t{index}"], expected)
    with zipfile.ZipFile(tmp_path / "file.pt") as archive, open(tmp_path / "file.pt", "rb") as handle:
        assert archive.testzip() is None
        for info in archive.infolist():
            handle.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(handle.read(2), "little") for _ in range(2))
            assert (info.header_offset + 30 + name + extra) % ALIGNMENT == 0


def test_wide_records_are_read_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit fields that sizes and offsets above 4 GiB need, used from 300 bytes on."""
    monkeypatch.setattr("modellink.checkpoint.stored_zip.WIDE_FROM", 300)
    state = some_state()
    save_rank_file(tmp_path / "file.pt", state)
    assert_equal(state, torch.load(tmp_path / "file.pt", mmap=True, weights_only=False))
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        assert archive.testzip() is None


def test_mapped_reading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    save_rank_file(tmp_path / "file.pt", {"model": {"big": torch.ones(16_000_000)}})

    def anonymous() -> int:
        with open("/proc/self/status") as handle:
            return next(int(line.split()[1]) * 1024 for line in handle if line.startswith("RssAnon"))

    before = anonymous()
    big = load_rank_file(tmp_path / "file.pt")["model"]["big"]
    assert big.sum().item() == 16_000_000
    assert anonymous() - before < 16e6  # the tensor has 64 MB


class Evil:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


class Custom:
    def __init__(self) -> None:
        self.value = 3


@pytest.mark.parametrize("place", ["args", "model", "rng_state"])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, place: str) -> None:
    evil = Evil(f"touch {tmp_path}/ran")
    state = {"args": argparse.Namespace(hidden_size=1), "iteration": 1}
    if place == "args":
        state["args"].evil = evil
        state["args"].custom = Custom()
        state["args"].kind = Custom
    else:
        state[place] = {"inner": [evil]}
    torch.save(state, tmp_path / "file.pt")
    if place == "args":
        args = load_rank_file(tmp_path / "file.pt")["args"]
        assert args.hidden_size == 1
        assert is_placeholder(args.evil) and is_placeholder(args.custom) and is_placeholder(args.kind)
    else:
        with pytest.raises(ConfigError, match=rf"{place}/inner\[0\] is an object of (posix|os)\.system"):
            load_rank_file(tmp_path / "file.pt")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil))  # the same object does run when it is unpickled plainly
    assert (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_rank_file(path, some_state())
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "truncated"),
        (b"", "empty"),
        (b"junk" * 100, "not a whole"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_rank_file(path)
    path.unlink()
    with pytest.raises(ConfigError, match="no such file"):
        load_rank_file(path)
    torch.save([1, 2], path)
    with pytest.raises(ConfigError, match="holds a list"):
        load_rank_file(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_rank_file(path, {"iteration": 1})

    def fail() -> list[torch.Tensor]:
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="No space left on device"):
        save_rank_file(path, {"model": {"a": torch.ones(3), "b": LazyTensor("b", (2,), torch.float32, 0, fail)}})
    assert load_rank_file(path) == {"iteration": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.pt"]


def test_a_dtype_torch_has_no_storage_for_is_a_bug_not_a_silent_loss(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="uint16"):
        save_rank_file(tmp_path / "file.pt", {"a": torch.zeros(2, dtype=torch.uint16)})
    assert not list(tmp_path.iterdir())
