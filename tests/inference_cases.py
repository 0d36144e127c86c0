"""What the generation tests ask, the folders they need, and the worker processes that answer, once a world size."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from data_helpers import make_tokenizer
from tiny import save_tiny

from modellink.checkpoint.convert import main as convert
from modellink.config.errors import run_command

REPO = Path(__file__).parent.parent
WORDS = 1003
NUM_NEW = 10
# TP and PP by number of ranks; the rest of the ranks are data parallel replicas
LAYOUTS = {"1": [[1, 1]], "2": [[2, 1], [1, 2], [1, 1]], "4": [[2, 2], [1, 2]]}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = {"untied": {}, "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True}}
FORMS = {"untied": ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2",
                    "--num-layers-per-virtual-pipeline-stage", "1"],
         "tied": ["--ckpt-format", "torch_dist"]}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [900], [17, 500, 3], [44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55]]
# passes of the logits case over three rows: a prompt in parts, rows of other lengths, then all rows together
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 35], [8, 97, 9, 3], [23, 84, 62, 64, 33, 8]]
PASSES = [(0, [ROWS[0][:4]]), (0, [ROWS[0][4:7]]), (1, [ROWS[1][:1]]), (2, [ROWS[2][:3]]),
          (0, [ROWS[0][7:9], ROWS[1][1:3], ROWS[2][3:5]]), (0, [ROWS[0][9:], ROWS[1][3:], ROWS[2][5:]])]
# for each pass the (row, position) of its last tokens
SEEN = [[(0, 3)], [(0, 6)], [(1, 0)], [(2, 2)], [(0, 8), (1, 2), (2, 4)], [(0, 9), (1, 3), (2, 5)]]

_random = random.Random(7)


def _tokens(count: int) -> list[int]:
    return [_random.randrange(1, WORDS) for _ in range(count)]


HEADER = _tokens(40)
SHARING = [HEADER + _tokens(count) for count in (3, 9, 1, 5)]  # prompts that begin alike
# questions behind one header with four choices each, one long pair, contexts that are the beginning of each other
PAIRS: list[tuple[list[int], list[int]]] = [
    (question, _tokens(count)) for question in [HEADER + _tokens(count) for count in (4, 11, 7)]
    for count in (1, 1, 2, 4)] + [([3], _tokens(90)), (HEADER[:5], []), ([3], [9])] + [
    (HEADER[:count], [HEADER[count]]) for count in (1, 2, 17)]
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2}, {"num_beams": 3, "length_penalty": 0.0}, {"num_beams": 4, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0}, {"num_beams": 2, "length_penalty": -1.0},
    {"num_beams": 3, "repetition_penalty": 1.5, "min_new_tokens": 4}]
STOPS = list(range(0, WORDS, 9))  # so many that answers of random models end
SAMPLED: list[dict[str, Any]] = [
    {}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.02}, {"min_new_tokens": 6}, {"repetition_penalty": 1.4},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.01}, {"num_beams": 3},
    {"num_beams": 2, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}]


def to_megatron(hf: Path, target: Path, *flags: str) -> None:
    assert run_command(convert, ["--from", "hf", "--to", "megatron", "--load-dir", str(hf), "--save-dir", str(target),
                                 *flags]) == 0


def make_place(root: Path) -> Path:
    """A tokenizer, and models as HF folders and as Megatron checkpoints (bf16: of one rank)."""
    make_tokenizer(root / "tokenizer", 900)
    for name, changes in MODELS.items():
        save_tiny(root / name, **changes)
        (root / name / "generation_config.json").unlink()
        to_megatron(root / name, root / f"{name}_mg", *FORMS[name])
    save_tiny(root / "bf16_hf", dtype=torch.bfloat16)
    to_megatron(root / "bf16_hf", root / "bf16")
    return root


def environment() -> dict[str, str]:
    names = [name for name in os.environ if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    return {**{name: os.environ[name] for name in names}, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
            "OMP_NUM_THREADS": "1"}


class Results(dict[str, list[dict[tuple[str, str], dict[str, Any]]]]):
    """For each world size what each rank saw; its workers run once, when it is first asked for."""

    def __init__(self, place: Path):
        super().__init__()
        self.place = place

    def __missing__(self, world: str) -> list[dict[tuple[str, str], dict[str, Any]]]:
        (self.place / "cases.json").write_text(json.dumps({
            "layouts": LAYOUTS, "models": {name: f"{name}_mg" for name in MODELS}}))
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world,
             str(REPO / "tests" / "inference_worker.py"), str(self.place)],
            env=environment(), capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-6000:]
        self[world] = [torch.load(self.place / f"world{world}_rank{rank}.pt", weights_only=False)
                       for rank in range(int(world))]
        return self[world]
