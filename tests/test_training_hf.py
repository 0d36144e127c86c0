"""No step by hand: training starts from a HF folder and exports one, in any layout, also with uneven stages."""

from pathlib import Path

import pytest
import torch
from ladder import read_metrics, run_cases
from tiny import save_tiny

from modellink.checkpoint.convert import main as convert

LAYOUTS = {
    1: {"one": []},
    2: {"uneven": ["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "1"],
        "listed": ["--pipeline-model-parallel-size", "2", "--num-layer-list", "3,1"]},
    4: {"tp2-pp2-vpp2": ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
                         "--num-layers-per-virtual-pipeline-stage", "1", "--sequence-parallel"]},
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("hf")
    save_tiny(base / "model", num_key_value_heads=2)
    assert convert(["--from", "hf", "--to", "megatron", "--load-dir", str(base / "model"), "--save-dir",
                    str(base / "mg")]) == 0
    for world, layouts in LAYOUTS.items():
        cases = [[*common(base, base / "model"), "--save-hf", str(base / f"{name}-out"), "--metrics-file",
                  str(base / f"{name}.jsonl"), *flags] for name, flags in layouts.items()]
        if world == 1:
            cases.append([*common(base, base / "mg"), "--finetune", "--metrics-file", str(base / "converted.jsonl")])
        run_cases(cases, world, base)
    return base


def common(base: Path, load: Path) -> list[str]:
    return ["--load", str(load), "--mock-data", "--seq-length", "32", "--train-iters", "3", "--lr", "1e-3",
            "--micro-batch-size", "2", "--global-batch-size", "8", "--eval-iters", "0", "--device", "cpu"]


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_those_of_converted_weights(name: str, folder: Path) -> None:
    expected = [record["loss"] for record in read_metrics(folder / "converted.jsonl")]
    assert [record["loss"] for record in read_metrics(folder / f"{name}.jsonl")] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_export_is_what_was_trained(name: str, folder: Path) -> None:
    """transformers loads it, and every layout's export gives the same logits."""
    from transformers import Qwen2ForCausalLM

    tokens = torch.randint(0, 1003, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, one, start = (Qwen2ForCausalLM.from_pretrained(folder / source, dtype=torch.float32)(tokens).logits
                              for source in (f"{name}-out/iter_0000003", "one-out/iter_0000003", "model"))
    torch.testing.assert_close(logits, one, atol=2e-4, rtol=0)  # Adam makes full steps of rounding noise
    assert (logits - start).abs().max() > 1e-2
