"""Training, resuming, LoRA and generation with `--device npu` on the simulated device equal the cpu device's."""

from npu_environment import CANN_9, WORKER, operators_of, require_simulation, without_kernel

require_simulation()

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from ladder import read_metrics, run_cases  # noqa: E402
from tiny import save_tiny  # noqa: E402

from modellink.data.indexed import IndexedWriter  # noqa: E402

STEPS, SEQ, GBS, VOCAB = 8, 32, 4, 1003
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
SP, ZERO = ["--sequence-parallel"], ["--use-distributed-optimizer"]
LORA = ["--lora-r", "4", "--lora-alpha", "8", "--lora-target-modules", "all-linear"]
# name: (ranks, flags, reference)
RUNS: dict[str, tuple[int, list[str], str]] = {
    "one": (1, [], "plain"),
    "lora": (1, LORA, "lora"),
    "tp2": (2, TP2, "plain"),
    "tp2-sp": (2, TP2 + SP, "plain"),
    "pp2": (2, PP2, "plain"),
    f"pp2{CANN_9}": (2, PP2, "plain"),
    "pp2-vpp2": (2, [*PP2, *VPP], "plain"),
    "dp2-zero": (2, ZERO, "plain"),
    "lora-tp2-sp": (2, [*LORA, *TP2, *SP], "lora"),
}
REFERENCES = {"plain": [], "lora": LORA}
RESUMED = {"one": (1, []), "dp2-zero": (2, ZERO)}
# a run of TP2 with sequence parallelism is stopped after half of its steps; others go on from its checkpoint
STOPPED = [*TP2, *SP, *ZERO]
CONTINUED = {"pp2-vpp2": (2, "npu", [*PP2, *VPP]), "dp2-zero": (2, "npu", ZERO), "one": (1, "npu", []),
             "cpu": (1, "cpu", [])}


def arguments(folder: Path, name: str, device: str, *more: str) -> list[str]:
    return ["--load", str(folder / "model"), "--finetune", "--data-path", str(folder / "data"), "--split", "100,0,0",
            "--seq-length", str(SEQ), "--train-iters", str(STEPS), "--micro-batch-size", "2", "--global-batch-size",
            str(GBS), "--lr", "2e-3", "--lr-decay-style", "constant", "--clip-grad", "0.5", "--eval-iters", "0",
            "--device", device, "--metrics-file", str(folder / f"{name}.{device}.jsonl"), *more]


def halves(folder: Path, name: str, device: str, flags: list[str]) -> list[list[str]]:
    """Four steps at once; then two, and two more from the checkpoint."""
    whole = arguments(folder, f"{name}.whole", device, *flags, "--train-iters", "4", "--save",
                      str(folder / f"{name}-whole"))
    first = arguments(folder, f"{name}.first", device, *flags, "--train-iters", "4", "--save",
                      str(folder / f"{name}-halves"), "--exit-interval", "2")
    second = [word for word in arguments(folder, f"{name}.second", device, *flags, "--train-iters", "4", "--save",
                                         str(folder / f"{name}-halves")) if word != "--finetune"]
    second[1] = str(folder / f"{name}-halves")
    return [whole, first, second]


def continued(folder: Path, name: str) -> list[str]:
    """The second half of the steps, from the checkpoint of another layout."""
    _, device, flags = CONTINUED[name]
    words = arguments(folder, f"{name}.continued", device, *flags)
    words.remove("--finetune")
    words[1] = str(folder / "stopped")
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: the references on the CPU, the others on the simulated NPU."""
    base = tmp_path_factory.mktemp("npu")
    save_tiny(base / "model", num_key_value_heads=2)
    generator = np.random.default_rng(7)
    with IndexedWriter(base / "data") as writer:
        lengths = generator.integers(5, 90, 60)
        writer.append(generator.integers(0, VOCAB, lengths.sum()), lengths)
    run_cases([arguments(base, name, "cpu", *flags) for name, flags in REFERENCES.items()], 1, base)
    for world in (2, 1):
        cases = [arguments(base, name, "npu", *flags) for name, (size, flags, _) in RUNS.items() if size == world]
        for name, (size, flags) in RESUMED.items():
            if size == world:
                cases += halves(base, name, "npu", flags)
        if world == 2:
            cases.append(arguments(base, "stopped", "npu", *STOPPED, "--exit-interval", str(STEPS // 2), "--save",
                                   str(base / "stopped"), "--ckpt-format", "torch_dist"))
        cases += [continued(base, name) for name, (size, device, _) in CONTINUED.items() if (size, device) == (world,
                                                                                                               "npu")]
        run_cases(cases, world, base, worker=WORKER)
    run_cases([continued(base, "cpu")], 1, base)
    return base


@pytest.mark.parametrize("name", RUNS)
def test_losses_equal_those_of_the_cpu(name: str, folder: Path) -> None:
    reference = read_metrics(folder / f"{RUNS[name][2]}.cpu.jsonl")
    records = read_metrics(folder / f"{name}.npu.jsonl")
    assert len(records) == STEPS
    assert [record["loss"] for record in records] == pytest.approx([r["loss"] for r in reference], abs=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx([r["grad_norm"] for r in reference], rel=1e-4)
    assert len({record["loss"] for record in records}) == STEPS


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_come_through_the_nodes_of_torch_npu(world: int, folder: Path) -> None:
    records = [json.loads(path.read_text()) for path in folder.glob(f"cases{world}-*.record")]
    assert len(records) == world
    for record in records:
        assert {"NpuRmsNormBackward0", "NpuSwigluBackward0", "NpuFusionAttentionBackward0"} <= set(record["nodes"])
        assert {"npu::npu_rms_norm", "npu::npu_rotary_mul", "npu::npu_swiglu",
                "npu::npu_fusion_attention"} <= set(record["calls"])


def test_neighbours_send_as_torch_npu_does_under_a_new_cann(folder: Path) -> None:
    """From CANN 9 on torch_npu makes one batch of single sends, before it was a call of its own; see `pp2` for that."""
    batches = [json.loads(path.read_text())["batches"] for path in folder.glob("cases2-*.record")]
    assert all(len(found) >= STEPS and set(found) <= {1, 2} for found in batches)


@pytest.mark.parametrize("world", [1, 2])
def test_torch_npu_has_a_kernel_for_every_operator(world: int, folder: Path) -> None:
    """Also for what is not fused: an operator without one would run on the CPU of the owner of an NPU."""
    ran = operators_of(folder, world)
    assert {"aten::mm", "aten::_fused_adamw_", "aten::embedding_dense_backward"} <= ran
    assert without_kernel(ran) == set()


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_continues_bit_for_bit(name: str, folder: Path) -> None:
    whole = [record["loss"] for record in read_metrics(folder / f"{name}.whole.npu.jsonl")]
    parts = [record["loss"] for part in ("first", "second")
             for record in read_metrics(folder / f"{name}.{part}.npu.jsonl")]
    assert parts == whole and len(whole) == 4


@pytest.mark.parametrize("name", CONTINUED)
def test_another_layout_or_device_continues_the_run(name: str, folder: Path) -> None:
    expected = [record["loss"] for record in read_metrics(folder / "plain.cpu.jsonl")]
    stopped = [record["loss"] for record in read_metrics(folder / "stopped.npu.jsonl")]
    records = read_metrics(folder / f"{name}.continued.{CONTINUED[name][1]}.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS // 2 + 1, STEPS + 1))
    assert stopped + [record["loss"] for record in records] == pytest.approx(expected, abs=1e-5)
