"""Recorded steps of generation: the same tokens as from steps that are launched one by one."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from data_helpers import make_tokenizer
from inference_cases import MODELS, REPO, environment
from tiny import save_tiny

from modellink.checks.wishes import wish_notices
from modellink.config.settings import parse_settings
from modellink.inference.cache import KVCache, Piece
from modellink.parallel.dims import ParallelDims


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("steps")
    make_tokenizer(folder / "tokenizer", 900)
    for name, changes in MODELS.items():
        save_tiny(folder / name, **changes)
    done = subprocess.run([sys.executable, str(REPO / "tests" / "steps_worker.py"), str(folder)], env=environment(),
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "steps.json").read_text())


# int8 rounds keys: where sums in another order fall on the other side of a step, it is seen
@pytest.mark.parametrize(("case", "close"), [("untied auto plain", 1e-5), ("tied auto plain", 1e-5),
                                             ("tied int8 plain", 1e-3), ("untied auto flash", 1e-5)])
def test_recorded_steps_give_the_same_answers(case: str, close: float, results: dict[str, Any]) -> None:
    found = results[case]
    assert (found["flash"] > 100) == ("flash" in case)
    assert found["got"]["tokens"] == found["expected"]["tokens"]
    assert found["got"]["logprobs"] == pytest.approx(found["expected"]["logprobs"], abs=close)
    # most steps came from a recording, and a recording served many
    assert len(found["recorded"]) >= 8 and found["launches"] > 5 * len(found["recorded"])
    assert min(found["recorded"]) > 100
    # one memory for all of them; a second cache came, and with it new recordings in a new one
    assert found["pools"] == 2 and found["is_kept"]


def test_a_placed_step_reads_what_a_step_reads() -> None:
    """Cache by cache: rows of other lengths, a rounded end, tokens behind a row's end that must not be seen."""
    generator = torch.Generator().manual_seed(3)
    outs = []
    for is_placed in (False, True):
        generator.manual_seed(3)
        cache = KVCache([1], 3, 32, 2, 8, dtype=torch.float32, device=torch.device("cpu"))
        cache._memory[1].normal_(generator=generator)  # what ended rows have left
        for row, count in enumerate((9, 4, 17)):
            cache.tokens[row] = list(range(count))
        cache.begin([Piece(row, len(cache.tokens[row]), [7]) for row in range(3)])
        assert cache.is_step and cache.longest == 18
        if is_placed:
            cache.place_step(torch.tensor(cache.starts), 24)
        else:
            cache.place()
        q, k, v = (torch.randn(3, count, 8, generator=generator) for count in (4, 2, 2))
        outs.append(cache.attend(1, q, k, v))
        cache.end()
        assert [len(tokens) for tokens in cache.tokens] == [10, 5, 18]
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize(("dims", "device", "said"), [
    (ParallelDims(), "cuda", None), (ParallelDims(), "cpu", "on cpu"),
    (ParallelDims(tensor=2), "cuda", "with a model on 2 ranks")])
def test_it_is_said_where_steps_are_not_recorded(dims: ParallelDims, device: str, said: str | None) -> None:
    settings = parse_settings("inference.py", "", ["--cuda-graphs", "--load", "x"])
    lines = [line for line in wish_notices(settings, dims, device, "") if "cuda-graphs" in line]
    assert lines == ([] if said is None else [
        f"--cuda-graphs has no effect {said}: steps are launched kernel by kernel."])
