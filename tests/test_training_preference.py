"""Preference tuning: losses and gradients against transformers, in several layouts, with and without adapters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ladder import read_metrics, run_cases
from tiny import TINY, save_tiny

from modellink.config import ConfigError
from modellink.config.settings import PosttrainSettings, parse_settings
from modellink.data.indexed import IndexedWriter
from modellink.data.pair_dataset import PairDataset, PairStreams
from modellink.runtime import prepare_run

STEPS, SEQ, GBS, LR, BETA = 5, 32, 4, 1e-3, 0.3
VOCAB = TINY["vocab_size"]
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
LORA = ["--lora-target-modules", "all-linear", "--lora-r", "4", "--lora-alpha", "8"]
KINDS = ("sigmoid", "hinge", "ipo")
CASES = {
    "sigmoid": (1, []),
    "smooth": (1, ["--dpo-label-smoothing", "0.2"]),
    "hinge": (1, ["--dpo-loss-type", "hinge"]),
    "ipo": (1, ["--dpo-loss-type", "ipo"]),
    "lora": (1, LORA),
    "tp2-sp": (2, [*TP2, "--sequence-parallel"]),
    "pp2-vpp2": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "dp2-zero": (2, ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]),
    "lora-pp2": (2, [*PP2, *LORA]),
    # the reference is another model than the one that tuning starts from
    **{f"other-{kind}": (1, ["--ref-load", "@/other-mg", "--dpo-loss-type", kind]) for kind in KINDS},
}


def write_pairs(prefix: Path, count: int = 16) -> None:
    """Pairs that share a prompt; answers of unequal length."""
    generator = np.random.default_rng(5)
    streams: dict[str, list[np.ndarray]] = {}
    for _ in range(count):
        prompt = generator.integers(1, VOCAB, generator.integers(2, 8))
        for side in ("chosen", "rejected"):
            answer = generator.integers(1, VOCAB, generator.integers(2, 18))
            tokens = np.concatenate([prompt, answer])
            labels = np.concatenate([np.full_like(prompt, -100), answer])
            for kind, values in (("input_ids", tokens), ("attention_mask", np.ones_like(tokens)), ("labels", labels)):
                streams.setdefault(f"{side}_{kind}", []).append(values)
    for name, values in streams.items():
        with IndexedWriter(f"{prefix}_packed_{name}_document") as writer:
            writer.append(np.concatenate(values), np.array([len(value) for value in values]))


def base_arguments(folder: Path) -> list[str]:
    return ["--stage", "dpo", "--load", str(folder / "mg"), "--data-path", str(folder / "pairs"), "--split",
            "100,0,0", "--seq-length", str(SEQ), "--train-iters", str(STEPS), "--lr", str(LR), "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from modellink.checkpoint.convert import main as convert

    base = tmp_path_factory.mktemp("preference")
    for seed, source, target in ((1, "hf", "mg"), (2, "other", "other-mg")):
        save_tiny(base / source, seed=seed, num_key_value_heads=2)
        assert convert(["--from", "hf", "--to", "megatron", "--load-dir", str(base / source), "--save-dir",
                        str(base / target)]) == 0
    write_pairs(base / "pairs")
    for world in (1, 2):
        run_cases([[*base_arguments(base), "--finetune", "--micro-batch-size", "1", "--global-batch-size", str(GBS),
                    "--lr-decay-style", "constant", "--weight-decay", "0", "--dpo-beta", str(BETA), "--eval-iters", "0",
                    "--metrics-file", str(base / f"{name}.jsonl"), *(flag.replace("@", str(base)) for flag in flags)]
                   for name, (size, flags) in CASES.items() if size == world], world, base)
    return base


def logprob(model: torch.nn.Module, sample: dict[str, torch.Tensor], mean: bool) -> torch.Tensor:
    """Log-probability of the learnt tokens of one sample alone, without padding."""
    labels = sample["labels"]
    scores = model(sample["tokens"][None]).logits[0].log_softmax(-1)
    chosen = scores.gather(1, labels.clamp(min=0)[:, None])[:, 0][labels != -100]
    return chosen.mean() if mean else chosen.sum()


def expected(folder: Path, kind: str, smoothing: float = 0.0) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, accuracy) of a plain loop over the same pairs."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).train()
    frozen = Qwen2ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    data = PairDataset(PairStreams(folder / "pairs"), (0, 16), STEPS * GBS, 1234, VOCAB, SEQ)
    found = []
    for step in range(STEPS):
        losses, right = [], 0
        for pair in (data[i] for i in range(step * GBS, (step + 1) * GBS)):
            policy = [logprob(model, side, kind == "ipo") for side in pair]
            with torch.no_grad():
                reference = [logprob(frozen, side, kind == "ipo") for side in pair]
            d = (policy[0] - reference[0]) - (policy[1] - reference[1])
            if kind == "sigmoid":
                loss = -(1 - smoothing) * torch.sigmoid(BETA * d).log() - smoothing * torch.sigmoid(-BETA * d).log()
            else:
                loss = torch.clamp(1 - BETA * d, min=0) if kind == "hinge" else (d - 1 / (2 * BETA)) ** 2
            losses.append(loss)
            right += int(d > 0)
        total = torch.stack(losses).mean()
        optimizer.zero_grad()
        total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        found.append((total.item(), norm, right / GBS))
    return found


@pytest.mark.parametrize(("name", "kind", "smoothing"), [
    ("sigmoid", "sigmoid", 0.0), ("smooth", "sigmoid", 0.2), ("hinge", "hinge", 0.0), ("ipo", "ipo", 0.0)])
def test_losses_equal_a_plain_loop(name: str, kind: str, smoothing: float, folder: Path) -> None:
    records, plain = read_metrics(folder / f"{name}.jsonl"), expected(folder, kind, smoothing)
    assert [record["loss"] for record in records] == pytest.approx([loss for loss, _, _ in plain], abs=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx([norm for _, norm, _ in plain], rel=1e-4)
    assert [record["reward_accuracy"] for record in records[1:]] == [right for _, _, right in plain[1:]]
    assert {record["tokens"] for record in records} == {GBS}  # the loss counts pairs


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_trl(kind: str, folder: Path) -> None:
    """The first step against TRL's own trainer on the same pairs, with a reference that is another model."""
    trl = pytest.importorskip("trl", reason="TRL is a development extra and is not installed")
    from data_helpers import make_tokenizer
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    make_tokenizer(folder / "tokenizer", 300)
    model, reference = (Qwen2ForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
                        for name in ("hf", "other"))
    trainer = trl.DPOTrainer(
        model=model, ref_model=reference, processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        args=trl.DPOConfig(output_dir=str(folder / "trl"), loss_type=[kind], beta=BETA, use_cpu=True, bf16=False,
                           report_to=[], gradient_checkpointing=False))
    streams = PairStreams(folder / "pairs").streams
    order = PairDataset(PairStreams(folder / "pairs"), (0, 16), GBS, 1234, VOCAB, SEQ).order[:GBS]
    rows = [(streams[side, "input_ids"].get(int(i)), streams[side, "labels"].get(int(i)))
            for side in ("chosen", "rejected") for i in order]
    inputs = {name: torch.zeros(len(rows), SEQ, dtype=torch.long)
              for name in ("input_ids", "attention_mask", "completion_mask")}
    for row, (tokens, labels) in enumerate(rows):
        inputs["input_ids"][row, :len(tokens)] = torch.from_numpy(tokens)
        inputs["attention_mask"][row, :len(tokens)] = 1
        inputs["completion_mask"][row, :len(tokens)] = torch.from_numpy(labels != -100).long()
    loss = trainer._compute_loss(model, inputs, False)
    model.zero_grad()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    record = read_metrics(folder / f"other-{kind}.jsonl")[0]
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5, rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_first_losses_are_what_no_preference_gives(folder: Path) -> None:
    """Before the first step model and reference agree: log 2, 1, and 1 / (2 beta) squared."""
    for name, value in (("sigmoid", np.log(2)), ("lora", np.log(2)), ("hinge", 1.0), ("ipo", (1 / (2 * BETA)) ** 2)):
        assert read_metrics(folder / f"{name}.jsonl")[0]["loss"] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(("name", "reference"), [
    ("tp2-sp", "sigmoid"), ("pp2-vpp2", "sigmoid"), ("dp2-zero", "sigmoid"), ("lora-pp2", "lora")])
def test_layouts_equal_one_process(name: str, reference: str, folder: Path) -> None:
    records, one = read_metrics(folder / f"{name}.jsonl"), read_metrics(folder / f"{reference}.jsonl")
    for key, tolerance in (("loss", 1e-5), ("reward_accuracy", 0), ("reward_margin", 1e-4)):
        assert [record[key] for record in records] == pytest.approx([r[key] for r in one], abs=tolerance), key


def test_adapters_learn_the_preference(folder: Path) -> None:
    records = read_metrics(folder / "lora.jsonl")
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize(("change", "words"), [
    (["--load", "@/mg", "--save", "@/mg"], ["--ref-load is missing"]),
    (["--dpo-beta", "0"], ["--dpo-beta 0.0", "above 0"]),
    (["--dpo-label-smoothing", "0.1", "--dpo-loss-type", "ipo"], ["--dpo-label-smoothing", "sigmoid"]),
    (["--pack"], ["--pack", "instruction"]),
    (["--is-instruction-dataset"], ["--stage dpo with --is-instruction-dataset"]),
    (["--data-path", "@/nothing"], ["nothing"]),
])
def test_wrong_flags(change: list[str], words: list[str], folder: Path) -> None:
    line = [*base_arguments(folder), *(word.replace("@", str(folder)) for word in change)]
    with pytest.raises(ConfigError) as error:
        prepare_run(parse_settings("t", "", line), 1, "train")
    assert len(error.value.problems) == 1, error.value.problems
    for word in words:
        assert word in error.value.problems[0]


def test_posttrain_needs_a_stage() -> None:
    import posttrain_gpt

    with pytest.raises(ConfigError, match="--stage is missing"):
        posttrain_gpt.main(["--lr", "1"])
    assert PosttrainSettings().stage is None
