"""A table that is embedding and head: its gradient goes to the main gradient, and no table of zeros goes with it."""

import json
from pathlib import Path

import pytest
from ladder import read_metrics, run_cases
from tiny import save_tiny

STEPS, MICROBATCHES = 3, 2  # of each rank
BASE = ["--finetune", "--mock-data", "--seq-length", "32", "--train-iters", str(STEPS), "--micro-batch-size", "1",
        "--lr", "1e-3", "--eval-iters", "0", "--device", "cpu", "--fp32"]
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
CASES = {  # flags, samples of a step
    "dp2": ([], 4),
    "dp2-overlap": (OVERLAP, 4),
    "tp2": (["--tensor-model-parallel-size", "2", "--sequence-parallel"], 2),
    "pp2": (["--pipeline-model-parallel-size", "2"], 2),
    "deterministic": (["--use-deter-comp"], 4),
}
# the head's product goes into the main gradient, and then the rows of the embedding
SUM = ["addmm_", "index_add_"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tied")
    save_tiny(base / "model", tie_word_embeddings=True, num_hidden_layers=2)
    cases = [["--load", str(base / "model"), *BASE, "--global-batch-size", str(samples), "--metrics-file",
              str(base / f"{name}.jsonl"), *flags] for name, (flags, samples) in CASES.items()]
    run_cases(cases, 2, base, worker=Path(__file__).with_name("tied_worker.py"))
    return base


def tables(folder: Path, name: str, rank: int) -> list[str]:
    (path,) = folder.glob(f"cases2-*.{rank}.{list(CASES).index(name)}.tables")
    return json.loads(path.read_text())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["dp2", "dp2-overlap", "tp2"])
def test_a_backward_touches_the_main_gradient_alone(name: str, rank: int, folder: Path) -> None:
    assert tables(folder, name, rank) == SUM * (STEPS * MICROBATCHES)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_copies_on_two_stages_get_their_own_part(rank: int, folder: Path) -> None:
    assert tables(folder, "pp2", rank) == [SUM[1 - rank]] * (STEPS * MICROBATCHES)


def test_a_deterministic_look_up_needs_the_zeros(folder: Path) -> None:
    """Its gradient comes from autograd, which adds it to what the head hands."""
    for rank in (0, 1):
        found = tables(folder, "deterministic", rank)
        assert "index_add_" not in found
        assert [found.count(name) for name in ("addmm_", "zeros_like", "add_")] == [STEPS * MICROBATCHES] * 3


@pytest.mark.parametrize("name", ["dp2-overlap", "deterministic"])
def test_the_sum_is_the_same_either_way(name: str, folder: Path) -> None:
    expected, found = read_metrics(folder / "dp2.jsonl"), read_metrics(folder / f"{name}.jsonl")
    for value in ("loss", "grad_norm"):
        assert [record[value] for record in found] == pytest.approx([record[value] for record in expected], rel=1e-5)
