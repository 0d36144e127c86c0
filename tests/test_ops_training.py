"""Training in other forms of the operations: the NPU's over operator contracts, CUDA's layers over symmetric memory,
and fused weight gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
from ladder import read_metrics, run_cases
from tiny import save_tiny

from modellink.data.indexed import IndexedWriter

NPU_WORKER = Path(__file__).with_name("npu_ladder.py")
STEPS = 8
TP2SP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
FUSED = ["--gradient-accumulation-fusion"]
OVERFLOW = ["--fp16", "--initial-loss-scale", str(2.0**19), "--hysteresis", "1"]
# the width of MC2's products is at least 256 on each rank
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
WIDE = {**SMALL, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8,
        "tie_word_embeddings": False}
# the wide model diverges at the rate of the small one, and then a rounding grows from step to step
RATES = {"small": "1e-3", "wide": "2e-4"}
CASES = {  # name: (weights, world, in the worker with NPU forms, flags)
    "cpu": ("small", 1, False, []),
    "cpu-fused": ("small", 1, False, FUSED),
    "npu": ("small", 1, True, []),
    "npu-tp2": ("small", 2, True, TP2SP),
    "fused-tp2": ("small", 2, False, [*TP2SP, *FUSED]),
    "fused-pp2": ("small", 2, False, ["--pipeline-model-parallel-size", "2", *FUSED]),
    "fused-dp2": ("small", 2, False, ["--use-distributed-optimizer", "--overlap-grad-reduce", *FUSED]),
    "cpu-bf16": ("wide", 1, False, ["--bf16"]),
    "npu-bf16": ("wide", 1, True, ["--bf16"]),
    "npu-bf16-grouped": ("wide", 1, True, ["--bf16", *FUSED]),
    # a scale that overflows: the NPU's AdamW takes no found_inf, so the step must be left out before it
    "cpu-fp16": ("small", 1, False, OVERFLOW),
    "npu-fp16": ("small", 1, True, OVERFLOW),
    "npu-mc2": ("wide", 2, True, ["--bf16", *TP2SP, "--use-mc2"]),
    "symmetric-tp2": ("small", 2, True, [*TP2SP, "--use-symm-mem"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("forms")
    save_tiny(base / "small", **SMALL)
    save_tiny(base / "wide", **WIDE)
    generator = np.random.default_rng(7)
    with IndexedWriter(base / "data") as writer:
        lengths = generator.integers(5, 90, 60)
        writer.append(generator.integers(0, 1003, lengths.sum()), lengths)
    return base


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict]]:
    """Metrics of every case; under "called", which operators' kernels ran."""
    for world in (1, 2):
        for on_npu in (False, True):
            cases = [["--load", str(folder / weights), "--finetune", "--data-path", str(folder / "data"), "--split",
                      "100,0,0", "--seq-length", "32", "--train-iters", str(STEPS), "--micro-batch-size", "2",
                      "--global-batch-size", "4", "--lr", RATES[weights], "--lr-decay-style", "constant",
                      "--eval-iters", "0", "--device", "cpu", "--metrics-file", str(folder / f"{name}.jsonl"), *flags]
                     for name, (weights, size, npu, flags) in CASES.items() if (size, npu) == (world, on_npu)]
            options = {"worker": NPU_WORKER} if on_npu else {}
            run_cases(cases, world, folder, **options)
    return {name: read_metrics(folder / f"{name}.jsonl") for name in CASES}


def column(records: list[dict], name: str) -> list[float]:
    assert len(records) == STEPS
    return [record[name] for record in records]


@pytest.mark.parametrize("name", ["cpu-fused", "npu", "npu-tp2", "fused-tp2", "fused-pp2", "fused-dp2",
                                  "symmetric-tp2"])
def test_fp32_equals_the_plain_run(name: str, results: dict[str, list[dict]]) -> None:
    expected = results["cpu"]
    assert column(results[name], "loss") == pytest.approx(column(expected, "loss"), abs=1e-5)
    assert column(results[name], "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=1e-5)


@pytest.mark.parametrize("name", ["npu-bf16", "npu-bf16-grouped", "npu-mc2"])
def test_bf16_is_near_the_plain_run(name: str, results: dict[str, list[dict]]) -> None:
    """Rounding differs between forms; a wrong factor or a lost token would be a hundred times more."""
    expected = results["cpu-bf16"]
    assert column(results[name], "loss") == pytest.approx(column(expected, "loss"), abs=1e-2)
    assert column(results[name], "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=1e-2)


def test_a_step_with_gradients_that_are_not_finite_is_left_out(results: dict[str, list[dict]]) -> None:
    records, expected = results["npu-fp16"], results["cpu-fp16"]
    skipped, scales = column(records, "skipped"), column(records, "loss_scale")
    assert skipped[0] == 1.0 and skipped[-1] == 0.0 and skipped == column(expected, "skipped")
    for before, after, was_skipped in zip(scales, scales[1:], skipped[1:]):
        assert after == (before / 2 if was_skipped else before)
    assert column(records, "loss") == pytest.approx(column(expected, "loss"), abs=5e-3)


def test_the_other_forms_really_ran(folder: Path, results: dict[str, list[dict]]) -> None:
    called = {name for path in folder.glob("*.called") for name in json.loads(path.read_text())}
    assert called >= {"npu_rms_norm", "npu_rms_norm_backward", "npu_rotary_mul", "npu_swiglu", "npu_swiglu_backward",
                      "npu_fusion_attention", "npu_fusion_attention_grad", "npu_grouped_matmul_add_",
                      "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base",
                      "fused_all_gather_matmul", "fused_matmul_reduce_scatter"}
