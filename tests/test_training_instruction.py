"""Tuning on instruction data: losses against transformers, padded and packed alike, in every layout."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from ladder import read_metrics, run_cases
from tiny import TINY, save_tiny

from modellink.config import ConfigError
from modellink.config.settings import parse_settings
from modellink.data.collate import pack, pad
from modellink.data.indexed import IndexedWriter
from modellink.data.instruction_dataset import build_instruction_datasets
from modellink.runtime import prepare_run

STEPS, SEQ, GBS = 20, 48, 8
LR = 1e-3
VOCAB = TINY["vocab_size"]
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
VPP, SP = ["--num-layers-per-virtual-pipeline-stage", "1"], ["--sequence-parallel"]
LAYOUTS = {
    1: {"one": []},
    2: {"tp2": TP2, "tp2-sp": TP2 + SP, "pp2": PP2, "pp2-vpp2": PP2 + VPP, "dp2": ["--use-distributed-optimizer"]},
    4: {"tp2-pp2-sp": TP2 + PP2 + SP},
}
MODES = {"padded": [], "variable": ["--variable-seq-lengths", "--pad-to-multiple-of", "4"], "packed": ["--pack"]}
NAMES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts]


def write_streams(prefix: Path, count: int = 60, longest: int = 30) -> None:
    """Samples of unequal length; some have a label for one token only, and some for none."""
    generator = np.random.default_rng(11)
    samples = []
    for number in range(count):
        tokens = generator.integers(1, VOCAB, generator.integers(4, longest))
        labels = tokens.copy()
        learnt = {0: 0, 1: 1}.get(number % 10, int(generator.integers(1, len(tokens))))
        labels[:len(labels) - learnt] = -100
        samples.append((tokens, np.ones_like(tokens), labels))
    for index, name in enumerate(("input_ids", "attention_mask", "labels")):
        with IndexedWriter(f"{prefix}_packed_{name}_document") as writer:
            streams = [sample[index] for sample in samples]
            writer.append(np.concatenate(streams), np.array([len(stream) for stream in streams]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from modellink.checkpoint.convert import main as convert

    base = tmp_path_factory.mktemp("tuning")
    save_tiny(base / "hf", num_key_value_heads=2)
    assert convert(["--from", "hf", "--to", "megatron", "--load-dir", str(base / "hf"), "--save-dir",
                    str(base / "mg")]) == 0
    write_streams(base / "data")
    return base


def arguments(folder: Path, label: str) -> list[str]:
    return ["--load", str(folder / "mg"), "--finetune", "--is-instruction-dataset", "--data-path", str(folder / "data"),
            "--split", "100,0,0", "--seq-length", str(SEQ), "--train-iters", str(STEPS), "--micro-batch-size", "2",
            "--global-batch-size", str(GBS), "--lr", str(LR), "--lr-decay-style", "constant", "--weight-decay", "0.1",
            "--eval-iters", "0", "--device", "cpu", "--data-cache-path", str(folder / "cache"),
            "--metrics-file", str(folder / f"{label}.jsonl")]


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[str, str], list[dict]]:
    found = {}
    for world, layouts in LAYOUTS.items():
        cases = {(layout, mode): [*arguments(folder, f"{layout}.{mode}"), *layouts[layout], *MODES[mode]]
                 for layout, mode in itertools.product(layouts, MODES)}
        run_cases(list(cases.values()), world, folder)
        found |= {key: read_metrics(folder / f"{'.'.join(key)}.jsonl") for key in cases}
    return found


def samples(folder: Path) -> list[dict[str, torch.Tensor]]:
    data, _, _ = build_instruction_datasets(
        data_path=[str(folder / "data")], split="100,0,0", train_data_path=None, valid_data_path=None,
        test_data_path=None, vocab_size=VOCAB, num_samples=(STEPS * GBS, 0, 0), seq_length=SEQ, seed=1234,
        cache_dir=None, build=True)
    assert data is not None
    return [data[i] for i in range(STEPS * GBS)]


def transformers_loop(folder: Path, batches: list[list[dict[str, torch.Tensor]]]) -> list[tuple[float, float]]:
    """One sample at a time, without padding; the mean over all real label tokens of a batch."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).train()
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    found = []
    for batch in batches:
        count = sum(int((sample["labels"] != -100).sum()) for sample in batch)
        total = 0.0
        optimizer.zero_grad()
        for sample in batch:
            logits = model(sample["tokens"][None]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, sample["labels"], reduction="sum", ignore_index=-100)
            (loss / count).backward()
            total += loss.item() / count
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        found.append((total, norm))
    return found


def test_sft_equals_transformers(folder: Path, results: dict) -> None:
    data = samples(folder)
    expected = transformers_loop(folder, [data[i:i + GBS] for i in range(0, len(data), GBS)])
    records = results["one", "padded"]
    assert [record["loss"] for record in records] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert [record["grad_norm"] for record in records[:8]] == pytest.approx([n for _, n in expected[:8]], rel=1e-4)
    counts = [sum(int((s["labels"] != -100).sum()) for s in data[i:i + GBS]) for i in range(0, len(data), GBS)]
    assert [record["tokens"] for record in records] == counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "layout"), NAMES)
def test_layout_equals_one_process(world: int, layout: str, mode: str, results: dict) -> None:
    reference, records = results["one", mode], results[layout, mode]
    assert len(records) == STEPS
    assert [record["loss"] for record in records] == pytest.approx([r["loss"] for r in reference], abs=1e-5)
    assert [record["tokens"] for record in records] == [r["tokens"] for r in reference]


def test_variable_lengths_change_nothing(results: dict) -> None:
    padded, variable = results["one", "padded"], results["one", "variable"]
    assert [record["loss"] for record in variable] == pytest.approx([r["loss"] for r in padded], abs=1e-5)


def test_packed_rows_equal_their_samples_alone(folder: Path, results: dict) -> None:
    """The first step on packed rows: every sample of these rows alone through transformers gives the same loss."""
    from modellink.data.bins import pack_bins
    from modellink.data.packing import PackedDataset

    data, _, _ = build_instruction_datasets(
        data_path=[str(folder / "data")], split="100,0,0", train_data_path=None, valid_data_path=None,
        test_data_path=None, vocab_size=VOCAB, num_samples=(60, 0, 0), seq_length=SEQ, seed=1234, cache_dir=None,
        build=True)
    assert data is not None
    lengths = np.array([len(data[i]["tokens"]) for i in range(len(data))])
    rows = PackedDataset(data, *pack_bins(lengths, SEQ, 1234), 1234)
    batches = [[sample for row in range(step * GBS, step * GBS + GBS) for sample in rows[row]] for step in range(2)]
    assert len(batches[0]) > GBS  # several samples a row
    expected = transformers_loop(folder, batches)
    records = results["one", "packed"][:2]
    assert [record["loss"] for record in records] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx([norm for _, norm in expected], rel=1e-4)
    seen = sorted(int(sample) for row in range(len(rows.starts) - 1) for sample in rows.bin(row))
    assert seen == list(range(len(data)))  # an epoch visits every sample once


def sample(*tokens: int) -> dict[str, torch.Tensor]:
    values = torch.tensor(tokens)
    return {"tokens": values, "labels": torch.where(values > 5, values, -100), "loss_mask": (values > 5).float()}


def test_pad_and_pack() -> None:
    padded = pad([sample(1, 7), sample(8, 9, 3, 4)], 3)
    assert padded["tokens"].tolist() == [[1, 7, 0], [8, 9, 3]]
    assert padded["labels"].tolist() == [[0, 7, 0], [8, 9, 0]]
    assert padded["loss_mask"].tolist() == [[0, 1, 0], [1, 1, 0]]
    packed = pack([[sample(1, 7), sample(8)], [sample(9, 9, 9, 9)]], 4)
    assert packed["tokens"].tolist() == [[1, 7, 8, 0, 9, 9, 9, 9]]
    assert packed["cu_seqlens"].tolist() == [0, 2, 3, 4, 8]
    with pytest.raises(ValueError, match="do not fit"):
        pack([[sample(1, 2), sample(3, 4, 5)]], 4)


@pytest.mark.parametrize(("flags", "words"), [
    (["--data-path", "@/data", "--pack"], ["--pack", "--is-instruction-dataset"]),
    (["--data-path", "@/data", "--variable-seq-lengths"], ["--variable-seq-lengths", "--is-instruction-dataset"]),
    (["--mock-data", "--is-instruction-dataset"], ["--mock-data", "labels"]),
    (["--data-path", "@/data", "--is-instruction-dataset", "--pack", "--variable-seq-lengths"],
     ["--pack", "leave one"]),
    (["--data-path", "@/nothing", "--is-instruction-dataset"], ["nothing"]),
    (["--data-path", "@/data", "--is-instruction-dataset", "--pad-to-multiple-of", "0"], ["--pad-to-multiple-of 0"]),
])
def test_wrong_flags(flags: list[str], words: list[str], folder: Path) -> None:
    line = [word.replace("@", str(folder)) for word in flags]
    if "--is-instruction-dataset" not in flags:
        write_streams(folder / "plain")
        line = [word.replace(str(folder / "data"), str(folder / "plain_packed_input_ids_document")) for word in line]
    with pytest.raises(ConfigError) as error:
        prepare_run(parse_settings("t", "", [
            "--load", str(folder / "mg"), "--finetune", "--seq-length", "16", "--train-iters", "2", "--lr", "1e-3",
            "--device", "cpu", *line]), 1, "train")
    assert len(error.value.problems) == 1
    for word in words:
        assert word in error.value.problems[0]
