"""HCCL's buffers in the planner: the groups it counts are those that training uses, and the bytes follow the flag."""

import json
from pathlib import Path

import pytest
from group_worker import with_collectives, with_messages
from ladder import run_cases
from tiny import tiny_config

from modellink.config.settings import parse_settings
from modellink.models.run import Run
from modellink.parallel.communicators import single_neighbours
from modellink.planner.plan import Plan
from modellink.runtime import prepare_run

MIB = 1024**2
BASE = ["--mock-data", "--seq-length", "16", "--train-iters", "2", "--lr", "1e-3", "--eval-iters", "0"]
TP2, ZERO = ["--tensor-model-parallel-size", "2"], ["--use-distributed-optimizer"]
PP2, PP4 = ["--pipeline-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "4"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
CASES = [("tied", [*TP2, *PP2]), ("plain", [*TP2, *ZERO]), ("tied", PP4), ("plain", [*PP2, *VPP]),
         ("tied", [*PP2, *ZERO])]


def test_the_groups_counted_are_those_started_and_used(tmp_path: Path) -> None:
    """Before the first step every one of them has run a collective, and no other."""
    for name in ("tied", "plain"):
        tiny_config(tie_word_embeddings=name == "tied").save_pretrained(tmp_path / name)
    cases = [["--model", str(tmp_path / model), *BASE, "--global-batch-size", "8", "--device", "cpu", *flags]
             for model, flags in CASES]
    run_cases(cases, 4, tmp_path, worker=Path(__file__).with_name("group_worker.py"))
    for rank in range(4):
        (record,) = tmp_path.glob(f"cases4-*.{rank}.groups")
        for words, found in zip(cases, json.loads(record.read_text())):
            run = prepare_run(parse_settings("t", "t", words), 4, "train")
            stage = rank // (run.dims.tensor * run.dims.data)
            for phase in ("start", "run"):
                assert with_collectives(found[phase]) == set(run.groups(stage)), (phase, rank, words)
            if run.dims.chunks > 1:  # otherwise they go in batches, which gloo takes apart
                assert with_messages(found["start"]) == with_messages(found["run"]) == {"pp", "world"}
            else:
                assert not with_messages(found["start"])


def make_plan(world: int, *words: str, device: str = "npu") -> tuple[Run, Plan]:
    run = prepare_run(parse_settings("t", "t", ["--model", "qwen15-7b", *BASE, "--device", device, *words]), world,
                      "train", elsewhere=True)
    return run, Plan.of(run)


def test_bytes_follow_the_flag_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    assert make_plan(1)[1].stages[0].communicators == {}
    default = make_plan(4, *TP2)[1].stages[0]
    assert default.communicators == dict.fromkeys(("world", "tp", "dp", "mp"), 400 * MIB)
    named = make_plan(4, *TP2, "--hccl-buffer-size", "50", "tp=300")[1].stages[0]
    assert named.communicators == {"world": 100 * MIB, "tp": 600 * MIB, "dp": 100 * MIB, "mp": 100 * MIB}
    assert default.total - named.total == 700 * MIB
    monkeypatch.setenv("HCCL_BUFFSIZE", "120")
    one = make_plan(4, *TP2, "--hccl-buffer-size", "tp=300")[1].stages[0]
    assert one.communicators == {"world": 240 * MIB, "tp": 600 * MIB, "dp": 240 * MIB, "mp": 240 * MIB}


def test_only_an_npu_counts_them() -> None:
    run, plan = make_plan(4, *TP2, "--hccl-buffer-size", "50", device="cpu")
    assert plan.stages[0].communicators == {} and not any("HCCL" in line for line in plan.lines())
    assert run.notices == ("--hccl-buffer-size has no effect on cpu: its process groups have no such buffers.",)


def test_the_plan_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    run, plan = make_plan(8, *TP2, *PP2, "--num-layers-per-virtual-pipeline-stage", "4", "--hccl-buffer-size", "100")
    assert run.notices == () and single_neighbours(run.dims) == 2
    assert ("HCCL        buffers of the groups take 1,132,462,080 bytes of a rank's total (world 200 MiB, tp 200 MiB, "
            "dp 200 MiB, pp 200 MiB, mp 200 MiB, neighbours 80 MiB; --hccl-buffer-size sets them)") in plan.lines()
