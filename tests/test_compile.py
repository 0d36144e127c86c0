"""`--compile`: the same losses as without it, and one sentence where it cannot be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ladder import REPO, read_metrics, run_cases
from test_ops_reference import assert_same, leaf
from test_training_instruction import write_streams
from tiny import save_tiny

from modellink.config import ConfigError
from modellink.config.settings import parse_settings
from modellink.data.indexed import IndexedWriter
from modellink.models.run import Run
from modellink.ops import compiled, reference
from modellink.ops.forms import Situation
from modellink.ops.rotary import rotary_table
from modellink.ops.table import choose
from modellink.runtime import prepare_run

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
STEPS = 5
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
# more layers than torch keeps compiled versions of one function
DEEP = {"num_hidden_layers": 12, "hidden_size": 48, "intermediate_size": 80, "num_key_value_heads": 2}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@needs_compiler
def test_compiled_formulas(dtype: torch.dtype) -> None:
    close = {"atol": 2e-6, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 4e-2}
    for length in (5, 9):
        x, weight = leaf(length, 2, 24, dtype=dtype), leaf(24, seed=1, dtype=dtype)
        assert_same(lambda x, w: compiled.rms_norm(x, w, 1e-3), lambda x, w: reference.rms_norm(x, w, 1e-3), x, weight,
                    **close)
        assert_same(compiled.swiglu, reference.swiglu, x, **close)
        cos, sin, _ = rotary_table(length, 8, 1e4, dtype=dtype)[:, :, None, None]
        heads = x.detach().view(length, 2, 3, 8)
        torch.testing.assert_close(compiled.rotate(heads, cos, sin), reference.rotate(heads, cos, sin), **close)


LORA = ["--lora-r", "4", "--lora-alpha", "8", "--lora-target-modules", "all-linear"]
KINDS = {"plain": [], "full": FULL, "lora": LORA, "packed": ["--is-instruction-dataset", "--pack"]}
CASES = [("plain", "pointwise"), ("plain", "layer"), ("full", "layer"), ("lora", "layer"), ("packed", "layer")]


def words(folder: Path, kind: str, mode: str) -> list[str]:
    return ["--load", str(folder / "weights"), "--finetune", "--data-path", str(folder / "data"), "--split", "50,50,0",
            "--seq-length", "32", "--train-iters", str(STEPS), "--micro-batch-size", "2", "--global-batch-size", "4",
            "--lr", "1e-3", "--eval-iters", "1", "--eval-interval", "2", "--device", "cpu", "--compile", mode,
            "--metrics-file", str(folder / f"{kind}.{mode}.jsonl"), *KINDS[kind]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, data, and the runs without compiling."""
    base = tmp_path_factory.mktemp("compile")
    save_tiny(base / "weights", **DEEP)
    write_streams(base / "data")
    generator = np.random.default_rng(7)
    with IndexedWriter(base / "data") as writer:
        lengths = generator.integers(5, 90, 60)
        writer.append(generator.integers(0, 1003, lengths.sum()), lengths)
    run_cases([words(base, kind, "off") for kind in KINDS], 1, base)
    return base


def evaluations(path: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, path.read_text().splitlines()) if line["kind"] != "train"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_losses_equal_those_of_the_run_without_it(kind: str, mode: str, folder: Path) -> None:
    """Training and evaluation; and a layer is one graph, the same for all, unless its samples are packed."""
    run_cases([words(folder, kind, mode)], 1, folder, worker=Path(__file__).with_name("compile_ladder.py"))
    got, expected = (read_metrics(folder / f"{kind}.{name}.jsonl") for name in (mode, "off"))
    assert len(got) == len(expected) == STEPS
    assert [record["loss"] for record in got] == pytest.approx([record["loss"] for record in expected], abs=1e-5)
    assert [record["grad_norm"] for record in got] == pytest.approx([r["grad_norm"] for r in expected], rel=2e-5)
    assert evaluations(folder / f"{kind}.{mode}.jsonl") == pytest.approx(
        evaluations(folder / f"{kind}.off.jsonl"), abs=1e-5)
    (path,) = folder.glob("*.graphs")
    counted = json.loads(path.read_text())
    path.unlink()
    assert 0 < counted["graphs"] <= 16  # none for each layer, and none for each batch
    if kind == "packed":  # attention itself is left out
        assert all("torch.compiler.disable" in reason for reason in counted["breaks"]), counted
    else:
        assert counted["breaks"] == []


def test_compile_comes_first_where_it_was_asked_for() -> None:
    for device in ("cpu", "cuda"):
        got = {choice.operation: choice.form.run for choice in choose(Situation(device, wishes=frozenset({"compile"})))}
        assert (got["rms_norm"], got["rotary"], got["swiglu"]) == (compiled.rms_norm, compiled.rotate, compiled.swiglu)
    assert compiled.rms_norm not in {choice.form.run for choice in choose(Situation("cpu"))}


WORDS = ["--model", "qwen15-0.5b", "--mock-data", "--seq-length", "64", "--train-iters", "1", "--lr", "1e-3",
         "--device", "cpu"]


def prepared(words: list[str], world: int = 1) -> Run:
    return prepare_run(parse_settings("pretrain_gpt.py", "", [*WORDS, *words]), world, "train")


@pytest.mark.parametrize(("words", "world", "parts"), [
    (["--compile", "layer", "--tensor-model-parallel-size", "2"], 2, ("collectives", "use --compile pointwise")),
    (["--compile", "layer", "--gradient-accumulation-fusion"], 1, ("main gradient", "leave one of them out")),
    (["--compile", "all"], 1, ("--compile", "pointwise")),
])
def test_what_cannot_be_compiled(words: list[str], world: int, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(words, world)
    (sentence,) = caught.value.problems
    assert all(part in sentence for part in parts), sentence


@needs_compiler
def test_pointwise_goes_with_tensor_parallel() -> None:
    assert prepared(["--compile", "pointwise", "--tensor-model-parallel-size", "2"], 2).settings.device.compile


def test_no_compiler_is_one_sentence(tmp_path: Path) -> None:
    """The whole program: exit code 2, no traceback."""
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "pretrain_gpt.py", *WORDS, "--compile", "pointwise"], cwd=REPO,
                          env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == ("error: --compile pointwise on cpu: no C++ compiler was found (no-such-compiler); "
                                   "install g++ or name one with CXX, or leave --compile out.")
