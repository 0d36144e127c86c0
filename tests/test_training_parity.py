"""Every layout is the same model: losses and gradient norms against transformers and against one process."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ladder import read_metrics, run_cases
from tiny import save_tiny

from modellink.config import ConfigError
from modellink.config.settings import parse_settings
from modellink.data.datasets import build_datasets
from modellink.data.indexed import IndexedWriter

STEPS, SEQ, GBS, MBS = 8, 32, 8, 2
VOCAB = 1003  # odd: tensor parallel runs pad it
LR, MIN_LR, WARMUP, DECAY, WD, CLIP = 2e-3, 2e-4, 2, STEPS, 0.1, 0.5
# 4 layers; untied with as many groups as heads, and tied with grouped queries and a long rope base
MODELS = {
    "untied": {"num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": False},
    "tied": {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 5e6},
}
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]
SP, ZERO = ["--sequence-parallel"], ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
LAYOUTS = {
    1: {"one": []},
    2: {"tp2": TP2, "tp2-sp": TP2 + SP, "pp2": PP2, "pp2-vpp2": PP2 + VPP, "dp2": [], "dp2-zero": ZERO + OVERLAP},
    4: {"pp4": ["--pipeline-model-parallel-size", "4"], "tp2-pp2-vpp2-sp": TP2 + PP2 + VPP + SP},
}
RECOMPUTE = {
    "stored": [],
    "full": ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
}
NAMES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in HF form and through the real converter, and an indexed data set."""
    from modellink.checkpoint.convert import main as convert

    base = tmp_path_factory.mktemp("parity")
    for name, changes in MODELS.items():
        save_tiny(base / name, **changes)
        assert convert(["--from", "hf", "--to", "megatron", "--load-dir", str(base / name),
                        "--save-dir", str(base / f"{name}-mg")]) == 0
    generator = np.random.default_rng(7)
    with IndexedWriter(base / "data") as writer:
        lengths = generator.integers(5, 90, 60)
        writer.append(generator.integers(0, VOCAB, lengths.sum()), lengths)
    return base


def arguments(folder: Path, model: str, label: str) -> list[str]:
    return ["--load", str(folder / f"{model}-mg"), "--finetune", "--data-path", str(folder / "data"),
            "--split", "100,0,0", "--seq-length", str(SEQ), "--train-iters", str(STEPS),
            "--micro-batch-size", str(MBS), "--global-batch-size", str(GBS), "--lr", str(LR), "--min-lr", str(MIN_LR),
            "--lr-decay-style", "cosine", "--lr-warmup-iters", str(WARMUP), "--weight-decay", str(WD),
            "--clip-grad", str(CLIP), "--adam-beta2", "0.95", "--eval-iters", "0", "--device", "cpu",
            "--metrics-file", str(folder / f"{label}.jsonl")]


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[str, str, str], list[dict]]:
    """Metrics of every (model, layout, recompute)."""
    found = {}
    for world, layouts in LAYOUTS.items():
        cases = {}
        for model, layout, recompute in itertools.product(MODELS, layouts, RECOMPUTE):
            label = f"{model}.{layout}.{recompute}"
            cases[model, layout, recompute] = [*arguments(folder, model, label), *layouts[layout],
                                               *RECOMPUTE[recompute]]
        run_cases(list(cases.values()), world, folder)
        for key in cases:
            found[key] = read_metrics(folder / f"{'.'.join(key)}.jsonl")
    return found


def schedule(step: int) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up from 0, then half a cosine."""
    done = step - 1
    if done <= WARMUP:
        return LR * done / WARMUP
    return MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (DECAY - WARMUP)))


def transformers_loop(folder: Path, model_name: str) -> tuple[list[float], list[float]]:
    """A plain loop: transformers' model and torch's AdamW on the same samples."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder / model_name, dtype=torch.float32).train()
    data, _, _ = build_datasets(
        data_path=[str(folder / "data")], split="100,0,0", train_data_path=None, valid_data_path=None,
        test_data_path=None, mock=False, vocab_size=VOCAB, num_samples=(STEPS * GBS, 0, 0), seq_length=SEQ, seed=1234,
        cache_dir=None, build=True)
    assert data is not None
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": WD}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        samples = [data[i] for i in range((step - 1) * GBS, step * GBS)]
        tokens = torch.stack([torch.as_tensor(sample["tokens"]) for sample in samples])
        labels = torch.stack([torch.as_tensor(sample["labels"]) for sample in samples])
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("model", MODELS)
def test_one_process_equals_transformers(model: str, folder: Path, results: dict) -> None:
    losses, norms = transformers_loop(folder, model)
    records = results[model, "one", "stored"]
    assert [record["lr"] for record in records] == pytest.approx([schedule(i) for i in range(1, STEPS + 1)], rel=1e-9)
    assert [record["loss"] for record in records] == pytest.approx(losses, abs=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("world", "layout"), NAMES)
def test_layout_equals_one_process(world: int, layout: str, model: str, recompute: str, results: dict) -> None:
    reference = results[model, "one", "stored"]
    records = results[model, layout, recompute]
    assert len(records) == STEPS
    assert [record["loss"] for record in records] == pytest.approx([r["loss"] for r in reference], abs=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx([r["grad_norm"] for r in reference], rel=1e-5)
    assert {record["tokens"] for record in records} == {SEQ * GBS}


def test_no_flag_selects_the_pairing_of_messages() -> None:
    """With PP2 the other pair of settings lets messages cross silently: it is derived, never asked for."""
    for name in ("--overlap-p2p-communication", "--no-overlap-p2p-communication", "--overlap-p2p-comm",
                 "--batch-p2p-comm", "--no-batch-p2p-communication"):
        with pytest.raises(ConfigError, match="unknown flag"):
            parse_settings("pretrain_gpt.py", "", [name])
