"""A run that was stopped and resumed in new processes continues bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ladder import read_metrics, run_cases
from tiny import TINY, tiny_config

from modellink.checkpoint.rank_file import load_rank_file
from modellink.checkpoint.show import show_lines
from modellink.config import ConfigError
from modellink.config.settings import parse_settings
from modellink.runtime import prepare_run

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
SP, ZERO = ["--sequence-parallel"], ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.0"]
CASES = {
    "fp32-dropout": (1, ["--fp32", *DROPOUT]),
    "fp32-dropout-workers": (1, ["--fp32", *DROPOUT, "--num-workers", "2"]),
    "fp16": (1, ["--fp16", "--initial-loss-scale", "512", "--loss-scale-window", "2", "--hysteresis", "1"]),
    "tp2-sp-bf16-dropout": (2, ["--bf16", *TP2, *SP, *DROPOUT]),
    "pp2-vpp2-tied": (2, ["--fp32", *PP2, *VPP]),
    "dp2-zero-bf16": (2, ["--bf16", *ZERO, *OVERLAP]),
    "dp2-zero-fp32": (2, ["--fp32", *ZERO]),
    "dp2-zero-fp16-late": (2, ["--fp16", *ZERO, "--initial-loss-scale", str(2.0**18), "--hysteresis", "1"]),
    "tp2-pp2-vpp2-sp-bf16": (4, ["--bf16", *TP2, *PP2, *VPP, *SP]),
    "tp2-dp2-zero-bf16-ramp": (4, ["--bf16", *TP2, *ZERO, *OVERLAP, "--rampup-batch-size", "4", "4", "16"]),
}


def arguments(folder: Path, name: str, label: str) -> list[str]:
    _, layout = CASES[name]
    return ["--model", str(folder / ("tied" if "tied" in name else "untied")), "--mock-data", "--split", "100,0,0",
            "--seq-length", "32", "--train-iters", "8", "--micro-batch-size", "2", "--global-batch-size", "8",
            "--lr", "1e-3", "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.2", "--eval-iters", "0",
            "--device", "cpu", "--seed", "5", "--metrics-file", str(folder / f"{name}.{label}.jsonl"),
            "--tensorboard-dir", str(folder / "board" / name / label), *layout]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 8 steps, runs stopped after 4, and their continuation in new processes."""
    base = tmp_path_factory.mktemp("resume")
    tiny_config(**TINY).save_pretrained(base / "untied")
    tiny_config(**TINY | {"tie_word_embeddings": True, "num_key_value_heads": 2}).save_pretrained(base / "tied")
    for world in (1, 2, 4):
        names = [name for name, (size, _) in CASES.items() if size == world]
        first = []
        for name in names:
            whole, halves = str(base / name / "whole"), str(base / name / "halves")
            first.append([*arguments(base, name, "whole"), "--save", whole])
            first.append([*arguments(base, name, "first"), "--save", halves, "--exit-interval", "4"])
        run_cases(first, world, base)
        run_cases([[*arguments(base, name, "second"), "--load", str(base / name / "halves"),
                    "--save", str(base / name / "halves")] for name in names], world, base)
    return base


def assert_same(a: Any, b: Any, place: str) -> None:
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for index, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{place}[{index}]")
    elif hasattr(a, "tolist"):
        assert a.tolist() == b.tolist(), place
    elif place.split("/")[-1] != "args":
        assert a == b, place


@pytest.mark.parametrize("name", CASES)
def test_four_and_four_steps_equal_eight(name: str, folder: Path) -> None:
    whole = read_metrics(folder / f"{name}.whole.jsonl")
    parts = read_metrics(folder / f"{name}.first.jsonl") + read_metrics(folder / f"{name}.second.jsonl")
    assert [record["step"] for record in parts] == list(range(1, 9))
    for key in ("loss", "grad_norm", "lr", "loss_scale", "samples", "skipped"):
        assert [record[key] for record in parts] == [record[key] for record in whole], key
    files = sorted(path.relative_to(folder / name / "whole")
                   for path in (folder / name / "whole" / "iter_0000008").rglob("*.pt"))
    assert files
    for file in files:
        assert_same(load_rank_file(folder / name / "whole" / file), load_rank_file(folder / name / "halves" / file),
                    str(file))


def test_checksums_of_a_save(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "dp2-zero-fp32" / "whole", copy)
    assert any("checksums of 2 files" in line for line in show_lines(copy, verify_checksums=True))
    file = copy / "iter_0000008" / "mp_rank_00" / "distrib_optim.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"distrib_optim\.pt: its CRC-32 is"):
        list(show_lines(copy, verify_checksums=True))


@pytest.mark.parametrize("name, world, flags, message", [
    ("dp2-zero-fp32", 1, ZERO, "is split over 2 data parallel ranks, but this run has 1"),
    ("dp2-zero-fp32", 2, [], "was saved with --use-distributed-optimizer, but this run is without it"),
    ("fp32-dropout", 1, ZERO, "was saved without --use-distributed-optimizer, but this run is with it"),
    ("fp32-dropout", 2, TP2, "is of layout TP1 PP1 with 1 model chunk a stage, but this run has TP2 PP1"),
])
def test_another_layout_is_refused_before_a_rank_starts(name: str, world: int, flags: list[str], message: str,
                                                        folder: Path) -> None:
    words = [*arguments(folder, name, "x"), "--load", str(folder / name / "whole")]
    words = [word for word in words if word not in ZERO] + flags
    with pytest.raises(ConfigError) as caught:
        prepare_run(parse_settings("x", "", words), world, "train")
    assert len(caught.value.problems) == 1
    assert message in str(caught.value) and "--ckpt-format torch_dist from the start" in str(caught.value)
    prepare_run(parse_settings("x", "", [*words, "--no-load-optim"]), world, "train")


def test_reading_ahead_changes_nothing(folder: Path) -> None:
    """Processes that read use no random number of training and give the same batches."""
    plain, ahead = (read_metrics(folder / f"{name}.whole.jsonl") for name in ("fp32-dropout", "fp32-dropout-workers"))
    assert [record["loss"] for record in ahead] == [record["loss"] for record in plain]


def test_precision_and_ramp_really_ran(folder: Path) -> None:
    fp16 = read_metrics(folder / "fp16.whole.jsonl")
    assert len({record["loss_scale"] for record in fp16}) > 1  # the dynamic scale moved
    assert 0.0 in {record["skipped"] for record in fp16[:4]}  # a step was taken before the save
    late = [record["skipped"] for record in read_metrics(folder / "dp2-zero-fp16-late.whole.jsonl")]
    assert set(late[:4]) == {1.0} and 0.0 in late[4:]  # saved before the first step that was taken
    ramp = read_metrics(folder / "tp2-dp2-zero-bf16-ramp.whole.jsonl")
    assert [record["samples"] for record in ramp] == [4, 4, 4, 4, 8, 8, 8, 8]
    model = load_rank_file(folder / "dp2-zero-bf16" / "whole" / "iter_0000008" / "mp_rank_00" / "model_optim_rng.pt")
    assert {tensor.dtype for tensor in model["model"].values()} == {torch.bfloat16}
    assert (folder / "dp2-zero-bf16" / "whole" / "iter_0000008" / "mp_rank_00" / "distrib_optim.pt").is_file()
