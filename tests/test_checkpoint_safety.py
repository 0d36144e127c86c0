"""Damage, malice and sudden death: one clear error, the source untouched, nothing half-written that looks whole."""

import multiprocessing
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from checkpoint_folders import assert_same, load_hf, make_hf, tree
from safetensors.torch import load_file

from modellink.checkpoint.checksums import MANIFEST, combine, file_sum, read_manifest
from modellink.checkpoint.convert import main
from modellink.checkpoint.hf import open_hf
from modellink.checkpoint.megatron import open_megatron
from modellink.config import run_command
from modellink.config.errors import ConfigError

TOOL = Path(__file__).parents[1] / "tools" / "checkpoint" / "convert_ckpt.py"
TO_MG = "--from hf --load-dir hf --save-dir out --target-tensor-parallel-size 2"
SMALL = {"layers": 1, "heads": 2, "groups": 2, "hidden": 4, "ffn": 4, "vocab": 8}


def run(text: str) -> int:
    return run_command(main, shlex.split(text))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Malice:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch owned",)


@pytest.mark.parametrize("place", ["weights", "weights of hf", "args", "beside", "rerun_state_machine"])
def test_no_code_in_a_pickle_runs(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(Path("hf"))
    assert run("--from hf --load-dir hf --save-dir mg") == 0
    path = Path("mg/iter_0000001/mp_rank_00/model_optim_rng.pt")
    saved = torch.load(path, weights_only=False)
    command = "--to hf --load-dir mg --save-dir out"
    if place == "weights":
        saved["model"]["decoder.final_layernorm.weight"] = Malice()
    elif place == "beside":
        saved["extra"] = [{"deep": Malice()}]
    elif place == "rerun_state_machine":
        saved[place] = Malice()
    elif place == "args":
        saved["args"].harmless = Malice()
    else:
        state = load_file("hf/model.safetensors")
        Path("hf/model.safetensors").unlink()
        torch.save({**state, "model.norm.weight": Malice()}, "hf/pytorch_model.bin")
        command = TO_MG
    torch.save(saved, path)
    code = run(command)
    assert not Path("owned").exists()
    with open("proof.pkl", "wb") as handle:  # the pickle is a real one
        pickle.dump(Malice(), handle)
    with open("proof.pkl", "rb") as handle:
        pickle.load(handle)
    assert Path("owned").exists()
    if place in ("args", "rerun_state_machine"):
        assert code == 0
    else:
        assert code == 2 and "is an object of posix.system" in capsys.readouterr().err
        assert not Path("out").exists()


def check_flips(path: Path, positions: Iterable[int], read: Callable[[], object],
                same: Callable[[object], bool]) -> int:
    """Flip a bit at each position in turn; each must be refused or change nothing. Returns how many were refused."""
    whole = path.read_bytes()
    refused = 0
    for position in positions:
        for bit in (1, 32):
            damaged = bytearray(whole)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            try:
                found = read()
            except ConfigError:
                refused += 1
                continue
            assert same(found), f"byte {position} of {path.name} flipped by {bit}: other weights were read"
    path.write_bytes(whole)
    return refused


def test_a_flipped_byte_in_a_safetensors_header_is_refused_or_harmless() -> None:
    state = make_hf(Path("hf"), **SMALL)
    path = Path("hf/model.safetensors")
    size = 8 + int.from_bytes(path.read_bytes()[:8], "little")

    def read() -> dict[str, torch.Tensor]:
        opened = open_hf(Path("hf"))
        return {name: opened.tensor(name) for name in state}

    refused = check_flips(path, range(0, size, 1), read, lambda found: all(
        torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state))
    assert refused > size / 3  # of two flips at each third byte


def test_a_flipped_byte_outside_the_tensors_of_a_rank_file_is_refused_or_harmless() -> None:
    state = make_hf(Path("hf"), **SMALL)
    assert run("--from hf --load-dir hf --save-dir mg") == 0
    path = Path("mg/iter_0000001/mp_rank_00/model_optim_rng.pt")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        data = [entry.header_offset for entry in entries if "/data/" in entry.filename]
        outside = {*range(data[0]), *range(archive.start_dir, path.stat().st_size)}
        for offset in data:  # a header ends where its padding ends, at a multiple of 64
            outside |= set(range(offset, offset + 48))

    def read() -> dict[str, torch.Tensor]:
        opened = open_megatron(Path("mg"))
        opened.check()
        return {name: opened.read(name, 0, 0, tensor.shape[0])[0] if "proj" not in name else None
                for name, tensor in state.items() if "_proj" not in name}

    def same(found: object) -> bool:
        return all(torch.equal(tensor, state[name]) for name, tensor in found.items())  # type: ignore[attr-defined]

    assert check_flips(path, sorted(outside)[::1], read, same) > len(outside)


def test_checksums_find_a_flipped_bit_in_a_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(Path("hf"))
    assert run("--from hf --load-dir hf --save-dir mg --target-pipeline-parallel-size 2") == 0
    assert run("--to hf --load-dir mg --save-dir out") == 0
    sums = read_manifest(Path("mg/iter_0000001"))
    assert sums is not None and sorted(sums) == [f"mp_rank_00_00{stage}/model_optim_rng.pt" for stage in (0, 1)]
    for name, entry in sums.items():
        assert file_sum(Path("mg/iter_0000001", name)) == entry
    listed = read_manifest(Path("out"))
    assert listed is not None and {*listed, MANIFEST} == {path.name for path in Path("out").iterdir()}
    for place, name, again in ((Path("mg/iter_0000001"), "mp_rank_00_001/model_optim_rng.pt", "--load-dir mg"),
                               (Path("out"), "model.safetensors", "--from hf --load-dir out")):
        path = place / name
        content = bytearray(path.read_bytes())
        content[len(content) * 3 // 5] ^= 4
        path.write_bytes(content)
        assert run(f"{again} --save-dir next --verify-checksums") == 2
        error = capsys.readouterr().err
        assert f"{path}: its CRC-32 is" in error and "damaged" in error
        assert not Path("next").exists()
        path.write_bytes(content + b"x")
        assert run(f"{again} --save-dir next --verify-checksums") == 2
        error = capsys.readouterr().err
        assert "bytes, but modellink_manifest.json says" in error or "file not fully covered" in error
        path.write_bytes(content)
    Path("out/tokenizer.json").unlink()
    assert run("--from hf --load-dir out --save-dir next --verify-checksums") == 2
    assert "tokenizer.json: is in modellink_manifest.json but not on disk" in capsys.readouterr().err


def test_checksums_of_foreign_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    """torch.save keeps a CRC-32 of each entry, so Megatron-LM's files can be checked too."""
    make_hf(Path("hf"))
    assert run("--from hf --load-dir hf --save-dir mg") == 0
    path = Path("mg/iter_0000001/mp_rank_00/model_optim_rng.pt")
    torch.save(torch.load(path, weights_only=False), path)
    Path("mg/iter_0000001", MANIFEST).unlink()
    assert run("--load-dir mg --save-dir a --verify-checksums") == 0
    assert "the checksums inside 1 torch files" in capsys.readouterr().out
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run("--load-dir mg --save-dir b --verify-checksums") == 2
    assert "damaged (Bad CRC-32" in capsys.readouterr().err
    assert run("--from hf --load-dir hf --save-dir c --verify-checksums") == 2
    assert "no modellink_manifest.json in it" in capsys.readouterr().err


def test_combined_checksums() -> None:
    import zlib

    generator = torch.Generator().manual_seed(1)
    for size in (0, 1, 2, 63, 4097, 70_001):
        left, right = (bytes(torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8).tolist())
                       for length in (37, size))
        assert combine(zlib.crc32(left), zlib.crc32(right), size) == zlib.crc32(left + right)


def _convert_and_die(text: str, at: int, done: "multiprocessing.Queue") -> None:
    """A process that is killed at its `at`-th call of the system functions that change the disk."""
    calls = 0

    def watch(function: Callable) -> Callable:
        def called(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return called

    for name in ("writev", "pwrite", "replace", "mkdir", "unlink", "rmdir", "fsync"):
        setattr(os, name, watch(getattr(os, name)))
    done.put(run(text))


@pytest.mark.parametrize("text, start, opened", [
    (TO_MG, None, open_megatron),
    (f"{TO_MG} --overwrite", "--from hf --load-dir hf2 --save-dir out", open_megatron),
    ("--to hf --load-dir mg --save-dir out", None, open_hf),
    ("--to hf --load-dir mg --save-dir out --overwrite", "--to hf --load-dir mg2 --save-dir out", open_hf),
])
def test_killed_at_any_moment(text: str, start: str | None, opened: Callable,
                              capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is under the target's name is either whole or refused, and the source is as it was."""
    states = {0: make_hf(Path("hf"), layers=2, seed=0), 1: make_hf(Path("hf2"), layers=2, seed=1)}
    assert run("--from hf --load-dir hf --save-dir mg") == 0
    assert run("--from hf --load-dir hf2 --save-dir mg2") == 0
    source = {name: (Path(name) / inner).read_bytes() for name, inner in (
        ("hf", "model.safetensors"), ("mg", "iter_0000001/mp_rank_00/model_optim_rng.pt"))}
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)  # a fork must not find the parent's thread pool
    outcomes = set()
    for at in range(1, 400):
        if start:
            subprocess.run(["rm", "-rf", "out"], check=True)
            assert run(start) == 0
            Path("out/mine.txt").write_text("mine")
        done = context.Queue()
        process = context.Process(target=_convert_and_die, args=(text, at, done))
        process.start()
        process.join()
        if process.exitcode == 0:
            assert done.get() == 0
            break
        assert process.exitcode == -signal.SIGKILL
        try:
            weights = opened(Path("out"))
            if hasattr(weights, "check"):
                weights.check()
            heads = torch.cat(weights.read("lm_head.weight", 0, 0, 101))
            which = [number for number, state in states.items() if torch.equal(heads, state["lm_head.weight"])]
            outcomes.add("old" if which == [1] else "new" if which == [0] else "mixed")
        except ConfigError:
            outcomes.add("refused")
        if not start:
            subprocess.run(["rm", "-rf", "out"], check=True)
    else:
        raise AssertionError("the conversion never ended")
    assert outcomes <= {"old", "new", "refused"} and outcomes >= {"old" if start else "refused", "new"}
    assert not list(Path().glob(".*.part"))  # what the killed ones left, the next one removed
    for name, content in source.items():
        assert next(path for path in Path(name).rglob("*") if path.suffix in (".pt", ".safetensors")
                    ).read_bytes() == content
    assert at > 10


def test_workers_write_the_same_files(capsys: pytest.CaptureFixture[str]) -> None:
    state = make_hf(Path("hf"))
    options = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2"
    assert run(f"--from hf --load-dir hf --save-dir one {options}") == 0
    assert run(f"--from hf --load-dir hf --save-dir three {options} --workers 3") == 0
    for path in sorted(Path("one").rglob("*")):
        other = Path("three") / path.relative_to("one")
        assert other.is_dir() if path.is_dir() else path.read_bytes() == other.read_bytes(), path
    assert run("--to hf --load-dir three --save-dir back --workers 2 --verify-checksums") == 0
    assert_same(state, load_hf(Path("back")))


FULL_DISK = """
import sys
from functools import partial
from pathlib import Path

from modellink.checkpoint.hf import HFFolder
from modellink.checkpoint.publish import publish_folder
from modellink.checkpoint.workers import write_parts
from modellink.config.errors import run_command


class Job:
    parts = (0, 1)

    def write(self, source, parts, sums):
        yield 1
        if parts == (1,):
            Path("/dev/full").open("wb", buffering=0).write(b"x")


def main(argv):
    with publish_folder(Path("out")):
        list(write_parts(Job(), None, partial(HFFolder, Path("hf")), 2, {}))


if __name__ == "__main__":
    sys.exit(run_command(main))
"""


def test_a_full_disk_in_a_worker_is_one_sentence_and_leaves_nothing() -> None:
    make_hf(Path("hf"))
    Path("job.py").write_text(FULL_DISK)
    before = tree(Path())
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "job.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "out: cannot write: No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1
    assert tree(Path()) == before


def test_workers_end_with_a_killed_parent() -> None:
    """A SIGKILL of the converter leaves no worker that goes on writing."""
    make_hf(Path("hf"), torch.float32, layers=8, hidden=480, ffn=1000, vocab=20000)
    job = subprocess.Popen([sys.executable, TOOL, *shlex.split(TO_MG), "--workers", "2"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(Path().glob(".out.*.part/iter_0000001/mp_rank_*")):
        time.sleep(0.005)
    children = [int(child) for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    job.kill()
    job.wait()
    assert len(children) >= 2 and not Path("out").exists()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(_runs(child) for child in children):
        time.sleep(0.05)
    assert not any(_runs(child) for child in children)


def _runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
