"""MC2, weight gradients added inside their product, and half precision on the simulated NPU, against the cpu device."""

from npu_environment import WORKER, operators_of, require_simulation, without_kernel

require_simulation()

import json  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from ladder import read_metrics, run_cases  # noqa: E402
from tiny import save_tiny  # noqa: E402

from modellink.data.indexed import IndexedWriter  # noqa: E402

STEPS, VOCAB = 8, 1003
TP2SP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
ZERO = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
MC2, FUSED, MINDSPEED = ["--use-mc2"], ["--gradient-accumulation-fusion"], ["--use-mindspeed-ops"]
RATES = {"small": "1e-3", "wide": "2e-4"}  # the wide model diverges at the rate of the small one
# a scale that overflows: AdamW on the NPU takes no found_inf, the step must be left out before it
FP16 = ["--fp16", "--initial-loss-scale", str(2.0**16), "--hysteresis", "1", "--loss-scale-window", "2"]
# name: (weights, ranks, flags); MC2's products need a width of 256 on each rank
REFERENCES = {
    "wide": ("wide", 1, []), "small": ("small", 1, []), "wide-bf16": ("wide", 1, ["--bf16"]),
    "small-bf16": ("small", 1, ["--bf16"]), "small-fp16": ("small", 1, FP16),
}
# name: (weights, ranks, flags, reference)
WHOLE = {
    "mc2": ("wide", 2, [*TP2SP, *MC2], "wide"),
    "mc2-grouped": ("wide", 2, [*TP2SP, *MC2, *FUSED], "wide"),
    "grouped": ("small", 1, FUSED, "small"),
    "grouped-dp2-zero": ("small", 2, [*ZERO, *FUSED], "small"),
    "mindspeed": ("small", 1, [*FUSED, *MINDSPEED], "small"),
    "mindspeed-tp2-sp": ("small", 2, [*TP2SP, *FUSED, *MINDSPEED], "small"),
}
HALF = {
    "bf16": ("small", 1, ["--bf16"], "small-bf16"),
    "bf16-tp2-sp": ("small", 2, ["--bf16", *TP2SP], "small-bf16"),
    "bf16-dp2-zero": ("small", 2, ["--bf16", *ZERO], "small-bf16"),
    "bf16-grouped": ("small", 1, ["--bf16", *FUSED], "small-bf16"),
    "bf16-mindspeed": ("small", 1, ["--bf16", *FUSED, *MINDSPEED], "small-bf16"),
    "bf16-mc2": ("wide", 2, ["--bf16", *TP2SP, *MC2], "wide-bf16"),
    "fp16": ("small", 1, FP16, "small-fp16"),
    "fp16-tp2-sp": ("small", 2, [*FP16, *TP2SP], "small-fp16"),
    "fp16-dp2-zero": ("small", 2, [*FP16, *ZERO], "small-fp16"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs; the weights are bf16 numbers, so that every precision starts from the same ones."""
    base = tmp_path_factory.mktemp("forms")
    few = {"num_hidden_layers": 2, "tie_word_embeddings": True, "dtype": torch.bfloat16}
    save_tiny(base / "small", num_key_value_heads=2, **few)
    save_tiny(base / "wide", **few, hidden_size=512, intermediate_size=512, num_attention_heads=8,
              num_key_value_heads=8)
    generator = np.random.default_rng(7)
    with IndexedWriter(base / "data") as writer:
        lengths = generator.integers(5, 90, 60)
        writer.append(generator.integers(0, VOCAB, lengths.sum()), lengths)

    def words(name: str, weights: str, flags: list[str], device: str) -> list[str]:
        precision = [] if {"--bf16", "--fp16"} & set(flags) else ["--fp32"]
        return ["--load", str(base / weights), "--finetune", "--data-path", str(base / "data"), "--split", "100,0,0",
                "--seq-length", "32", "--train-iters", str(STEPS), "--micro-batch-size", "2", "--global-batch-size",
                "4", "--lr", RATES[weights], "--lr-decay-style", "constant", "--eval-iters", "0", "--device", device,
                "--metrics-file", str(base / f"{name}.{device}.jsonl"), *precision, *flags]

    run_cases([words(name, weights, flags, "cpu") for name, (weights, _, flags) in REFERENCES.items()], 1, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERY_DTYPE", "1")  # for WHOLE: in fp32 a wrong wiring cannot hide behind roundings
        for world in (1, 2):
            run_cases([words(name, weights, flags, "npu") for name, (weights, size, flags, _) in (WHOLE | HALF).items()
                       if size == world], world, base, worker=WORKER)
    return base


def column(folder: Path, name: str, key: str) -> list[float]:
    records = read_metrics(folder / f"{name}.jsonl")
    assert len(records) == STEPS
    return [record[key] for record in records]


@pytest.mark.parametrize("name", WHOLE)
def test_losses_in_fp32_equal_those_of_the_cpu(name: str, folder: Path) -> None:
    got, expected = f"{name}.npu", f"{WHOLE[name][3]}.cpu"
    assert column(folder, got, "loss") == pytest.approx(column(folder, expected, "loss"), abs=1e-5)
    assert column(folder, got, "grad_norm") == pytest.approx(column(folder, expected, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_differs_by_its_rounding(name: str, key: str, folder: Path) -> None:
    """Both devices round the run in fp32, each in a direction of its own.

    So they differ by at most the sum of two such distances; the CPU's in bf16 is measured here, and a third one is
    allowed for chance. fp16 keeps 3 bits more. (A run that leaves out steps has no such fp32 run beside it.)
    """
    weights, _, _, reference = HALF[name]
    whole, rounded, cpu, npu = (np.array(column(folder, run, key)) for run in (
        f"{weights}.cpu", f"{weights}-bf16.cpu", f"{reference}.cpu", f"{name}.npu"))
    limit = 3 * abs(rounded - whole).max() / (8 if "fp16" in name else 1)
    taken = np.array(column(folder, f"{reference}.cpu", "skipped")) == 0.0
    assert abs(npu - cpu)[taken].max() < limit
    assert limit < 0.02 * whole.max()
    assert "fp16" in name or taken.all()


@pytest.mark.parametrize("name", [name for name in HALF if name.startswith("fp16")])
def test_the_loss_scale_moves_and_overflowing_steps_are_left_out(name: str, folder: Path) -> None:
    skipped, scales = (column(folder, f"{name}.npu", key) for key in ("skipped", "loss_scale"))
    assert (skipped, scales) == tuple(column(folder, "small-fp16.cpu", key) for key in ("skipped", "loss_scale"))
    assert set(skipped) == {0.0, 1.0}
    factors = [after / before for before, after in pairwise(scales)]
    assert {0.5, 2.0} <= set(factors) <= {0.5, 1.0, 2.0}


def test_the_operators_ran_under_our_own_nodes(folder: Path) -> None:
    one, *two = (json.loads(path.read_text()) for world in (1, 2) for path in sorted(folder.glob(
        f"cases{world}-*.record")))
    assert len(two) == 2
    for record in (one, *two):
        assert record["calls"]["npu::npu_grouped_matmul_add_"] > 0 and record["calls"]["mindspeed"] > 0
    for record in two:
        # weights of 2 layers and of the head: both microbatches of mc2-grouped, and the one that a replica has
        assert record["calls"]["npu::npu_grouped_matmul_add_"] == (2 * 4 + 1) * (2 + 1) * STEPS
    for record in two:
        # in each of 2 layers two column layers forward and two row layers backward, or two row layers forward, in both
        # microbatches of three runs
        runs = [name for name in WHOLE | HALF if "mc2" in name]
        for operator, products in (("npu::npu_all_gather_base_mm", 2 + 2), ("npu::npu_mm_reduce_scatter_base", 2)):
            assert record["calls"][operator] == 2 * products * 2 * STEPS * len(runs)
        assert {"ColumnLinearBackward", "RowLinearBackward"} <= set(record["nodes"])


@pytest.mark.parametrize("world", [1, 2])
def test_torch_npu_has_a_kernel_for_every_operator(world: int, folder: Path) -> None:
    """Also for MC2, for weight gradients added by an operator, and for the loss scale of fp16."""
    ran = operators_of(folder, world)
    assert {"aten::_fused_adamw_", "aten::_amp_foreach_non_finite_check_and_unscale_"} <= ran
    assert without_kernel(ran) == set()
