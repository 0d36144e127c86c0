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
from tiny import save_tiny

from modellink.config import ConfigError
from modellink.config.settings import parse_settings
from modellink.data.indexed import IndexedWriter
from modellink.models.run import Run
from modellink.ops import compiled, reference
from modellink.ops.forms import Situation
from modellink.ops.table import choose
from modellink.runtime import prepare_run

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
STEPS = 5
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
# more layers than torch keeps compiled versions of one function by default
DEEP = {"num_hidden_layers": 12, "hidden_size": 48, "intermediate_size": 80, "num_key_value_heads": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_compiler
def test_compiled_formulas(dtype: torch.dtype) -> None:
    close = {"atol": 2e-6, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 4e-2}
    for length in (5, 9):
        x, weight = leaf(length, 2, 24, dtype=dtype), leaf(24, seed=1, dtype=dtype)
        assert_same(lambda x, w: compiled.rms_norm(x, w, 1e-3), lambda x, w: reference.rms_norm(x, w, 1e-3), x, weight,
                    **close)
        assert_same(compiled.swiglu, reference.swiglu, x, **close)
        cos, sin = leaf(length, 1, 1, 4, dtype=dtype).detach(), leaf(length, 1, 1, 4, seed=2, dtype=dtype).detach()
        heads = x.detach().view(length, 2, 3, 8)
        torch.testing.assert_close(compiled.rotate(heads, cos, sin), reference.rotate(heads, cos, sin), **close)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("compile")
    save_tiny(folder / "weights", **DEEP)
    generator = np.random.default_rng(7)
    with IndexedWriter(folder / "data") as writer:
        lengths = generator.integers(5, 90, 60)
        writer.append(generator.integers(0, 1003, lengths.sum()), lengths)
    cases = {"off": [], "pointwise": ["--compile", "pointwise"], "layer": ["--compile", "layer"],
             "layer-full": ["--compile", "layer", *FULL]}
    run_cases([["--load", str(folder / "weights"), "--finetune", "--data-path", str(folder / "data"), "--split",
                "50,50,0", "--seq-length", "32", "--train-iters", str(STEPS), "--micro-batch-size", "2",
                "--global-batch-size", "4", "--lr", "1e-3", "--eval-iters", "1", "--eval-interval", "2", "--device",
                "cpu",
                "--metrics-file", str(folder / f"{name}.jsonl"), *flags] for name, flags in cases.items()], 1, folder)
    found = {name: read_metrics(folder / f"{name}.jsonl") for name in cases}
    for name in cases:
        lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
        found[f"{name}-evaluation"] = [line for line in lines if line["kind"] != "train"]
    return found


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["pointwise", "layer", "layer-full"])
def test_losses_equal_those_of_the_run_without_it(name: str, results: dict[str, list[dict]]) -> None:
    expected = results["off"]
    assert len(results[name]) == STEPS
    for column, tolerance in (("loss", {"abs": 1e-5}), ("grad_norm", {"rel": 1e-5})):
        assert [record[column] for record in results[name]] == pytest.approx(
            [record[column] for record in expected], **tolerance)
    assert [line["loss"] for line in results[f"{name}-evaluation"]] == pytest.approx(
        [line["loss"] for line in results["off-evaluation"]], abs=1e-5)


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
