"""`--grow-vocab`: rows for words the weights do not know, the same in every layout, and exported with the rest."""

import json
from pathlib import Path

import pytest
import torch
from data_helpers import make_tokenizer
from ladder import read_metrics, run_cases
from tiny import TINY, save_tiny

from modellink.checkpoint.convert import main as convert
from modellink.config import ConfigError
from modellink.config.settings import parse_settings
from modellink.runtime import prepare_run

ROWS = 290


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("grow")
    save_tiny(base / "hf", vocab_size=ROWS, tie_word_embeddings=True)
    make_tokenizer(base / "tokenizer", 301)
    assert convert(["--from", "hf", "--to", "megatron", "--load-dir", str(base / "hf"), "--save-dir",
                    str(base / "mg")]) == 0
    return base


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--load", str(folder / "mg"), "--finetune", "--mock-data", "--seq-length", "32", "--train-iters", "1",
            "--lr", "1e-9", "--global-batch-size", "4", "--eval-iters", "0", "--device", "cpu",
            "--tokenizer-name-or-path", str(folder / "tokenizer"), *more]


def test_more_words_than_rows(folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        prepare_run(parse_settings("t", "", arguments(folder)), 1, "train")
    (problem,) = error.value.problems
    assert "301 words" in problem and f"{ROWS} vocabulary rows" in problem and "--grow-vocab" in problem
    run = prepare_run(parse_settings("t", "", arguments(folder, "--grow-vocab")), 2, "train")
    assert run.model.vocab_size == 301
    assert any("11 rows added" in notice for notice in run.notices)
    with pytest.raises(ConfigError, match="--grow-vocab without --tokenizer-name-or-path"):
        line = arguments(folder, "--grow-vocab")
        at = line.index("--tokenizer-name-or-path")
        prepare_run(parse_settings("t", "", line[:at] + line[at + 2:]), 1, "train")


def test_new_rows_are_the_mean_in_every_layout_and_are_exported(folder: Path) -> None:
    from safetensors.torch import load_file
    from transformers import Qwen2ForCausalLM

    layouts = {"one": (1, []), "tp2": (2, ["--tensor-model-parallel-size", "2"]),
               "pp2": (2, ["--pipeline-model-parallel-size", "2"])}
    for name, (world, flags) in layouts.items():
        run_cases([arguments(folder, "--grow-vocab", "--save", str(folder / name), *flags)], world, folder)
    losses = [read_metrics(folder / name / "metrics.jsonl")[0]["loss"] for name in layouts]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    for name in layouts:
        out = folder / f"{name}-hf"
        assert convert(["--from", "megatron", "--to", "hf", "--load-dir", str(folder / name), "--save-dir",
                        str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 301
        old = load_file(folder / "hf" / "model.safetensors")["model.embed_tokens.weight"]
        new = Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32).model.embed_tokens.weight.detach()
        assert new.shape == (301, TINY["hidden_size"])
        torch.testing.assert_close(new[:ROWS], old, atol=1e-6, rtol=0)
        torch.testing.assert_close(new[ROWS:], old.mean(0).expand(11, -1), atol=1e-6, rtol=0)


def test_data_of_another_template_and_tokenizer_is_said(folder: Path, tmp_path: Path) -> None:
    from modellink.data.preprocess import main as preprocess

    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 4))
    make_tokenizer(tmp_path / "other", 280)
    assert preprocess(["--input", str(tmp_path / "a.json"), "--tokenizer-name-or-path", str(folder / "tokenizer"),
                       "--output-prefix", str(tmp_path / "x"), "--handler-name", "AlpacaStyleInstructionHandler",
                       "--workers", "1", "--prompt-type", "alpaca"]) == 0
    line = ["--load", str(folder / "mg"), "--finetune", "--is-instruction-dataset", "--data-path", str(tmp_path / "x"),
            "--split", "100,0,0", "--seq-length", "32", "--train-iters", "1", "--lr", "1e-9", "--device", "cpu",
            "--grow-vocab"]
    cases = [(["tokenizer", "--prompt-type", "alpaca"], 0, ""),
             (["tokenizer", "--prompt-type", "qwen"], 1, "template alpaca"),
             (["tokenizer"], 0, "")]
    for (name, *more), count, words in cases:
        run = prepare_run(parse_settings("t", "", [*line, "--tokenizer-name-or-path", str(folder / name), *more]), 1,
                          "train")
        warnings = [notice for notice in run.notices if notice.startswith("warning: ")]
        assert len(warnings) == count, warnings
        assert all(words in warning for warning in warnings)
    run = prepare_run(parse_settings("t", "", [*line, "--tokenizer-name-or-path", str(tmp_path / "other")]), 1, "train")
    assert any("made with the tokenizer" in notice for notice in run.notices)
