"""Tuning on the simulated NPU equals the cpu device: packed and variable rows, pairs of answers, adapters, stages."""

from npu_environment import WORKER, operators_of, require_simulation, without_kernel

require_simulation()

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from ladder import read_metrics, run_cases  # noqa: E402
from test_training_instruction import write_streams  # noqa: E402
from test_training_preference import write_pairs  # noqa: E402
from tiny import save_tiny  # noqa: E402

STEPS = 8
TP2SP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
VPP = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]
ZERO = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
INSTRUCTION = ["--is-instruction-dataset", "--data-path", "@/samples"]
KINDS = {
    "padded": INSTRUCTION,
    "variable": [*INSTRUCTION, "--variable-seq-lengths", "--pad-to-multiple-of", "4"],
    "packed": [*INSTRUCTION, "--pack"],
    "pairs": ["--stage", "dpo", "--data-path", "@/pairs"],
    "pairs-lora": ["--stage", "dpo", "--data-path", "@/pairs", "--lora-target-modules", "all-linear", "--lora-r", "4",
                   "--lora-alpha", "8"],
}
# (kind, layout): (ranks, flags)
RUNS = {
    ("packed", "one"): (1, []),
    ("packed", "one-full"): (1, FULL),
    ("packed", "tp2-sp"): (2, TP2SP),
    ("packed", "pp2-vpp2"): (2, VPP),
    ("variable", "one"): (1, []),
    ("variable", "pp2-vpp2"): (2, VPP),
    ("padded", "dp2-zero"): (2, ZERO),
    ("pairs", "one"): (1, []),
    ("pairs", "tp2-sp"): (2, TP2SP),
    ("pairs-lora", "pp2-vpp2"): (2, VPP),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tuning")
    save_tiny(base / "model", num_key_value_heads=2)
    write_streams(base / "samples")
    write_pairs(base / "pairs")

    def words(kind: str, layout: str, device: str, flags: list[str]) -> list[str]:
        size = "1" if "pairs" in kind else "2"
        return ["--load", str(base / "model"), "--finetune", "--split", "100,0,0", "--seq-length", "48",
                "--train-iters", str(STEPS), "--micro-batch-size", size, "--global-batch-size", "4", "--lr", "1e-3",
                "--lr-decay-style", "constant", "--eval-iters", "0", "--device", device, "--metrics-file",
                str(base / f"{kind}.{layout}.{device}.jsonl"),
                *(word.replace("@", str(base)) for word in KINDS[kind]), *flags]

    run_cases([words(kind, "one", "cpu", []) for kind in KINDS], 1, base)
    for world in (1, 2):
        run_cases([words(*key, "npu", flags) for key, (size, flags) in RUNS.items() if size == world], world, base,
                  worker=WORKER)
    return base


@pytest.mark.parametrize(("kind", "layout"), RUNS)
def test_losses_equal_those_of_the_cpu(kind: str, layout: str, folder: Path) -> None:
    reference = read_metrics(folder / f"{kind}.one.cpu.jsonl")
    records = read_metrics(folder / f"{kind}.{layout}.npu.jsonl")
    assert len(records) == STEPS and len({record["loss"] for record in records}) == STEPS
    assert [record["loss"] for record in records] == pytest.approx([r["loss"] for r in reference], abs=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx([r["grad_norm"] for r in reference], rel=1e-4)
    assert [record["tokens"] for record in records] == [r["tokens"] for r in reference]


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_come_through_the_node_of_torch_npu(world: int, folder: Path) -> None:
    for path in folder.glob(f"cases{world}-*.record"):
        assert "NpuFusionAttentionBackward0" in json.loads(path.read_text())["nodes"]
    assert len(list(folder.glob(f"cases{world}-*.record"))) == world


@pytest.mark.parametrize("world", [1, 2])
def test_torch_npu_has_a_kernel_for_every_operator(world: int, folder: Path) -> None:
    """Also for packed rows, pairs of answers and full recomputation."""
    ran = operators_of(folder, world)
    assert {"aten::mm", "aten::_fused_adamw_", "aten::log_sigmoid_forward"} <= ran
    assert without_kernel(ran) == set()
