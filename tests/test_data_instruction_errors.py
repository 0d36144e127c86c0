"""Wrong instruction data and wrong flags: one sentence, exit code 2, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_tokenizer, write_documents

from modellink.config import ConfigError, run_command
from modellink.data import show
from modellink.data.instruction_dataset import InstructionDataset, build_instruction_datasets
from modellink.data.preprocess import main

ALPACA, SHAREGPT = "AlpacaStyleInstructionHandler", "SharegptStyleInstructionHandler"
MESSAGES, LLAMA = "MessagesInstructionHandler", "LlamaFactoryInstructionHandler"
GOOD = {"instruction": "x", "input": "", "output": "y"}
TURNS = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def talk(*turns: Any, **more: Any) -> bytes:
    return lines({"conversations": list(turns), **more})


def info(**entry: Any) -> bytes:
    return json.dumps({"mine": entry}).encode()


# name: (handler, files, flags, what is said)
WRONG: dict[str, tuple[str, dict[str, bytes], list[str], str]] = {
    "missing column": (ALPACA, {"a.jsonl": lines({"question": "x", "answer": "y"})}, [],
                       "a.jsonl, line 1: no column 'instruction', the columns are question, answer; name the right one "
                       "with --map-keys"),
    "missing output": (ALPACA, {"a.jsonl": lines(GOOD, {"instruction": "x"})}, [], "line 2: no column 'output'"),
    "null output": (ALPACA, {"a.jsonl": lines({**GOOD, "output": None})}, [], "column 'output' is null, so the"),
    "number as output": (ALPACA, {"a.jsonl": lines({**GOOD, "output": 5})}, [],
                         "column 'output' holds a int where text is needed; name a text column with --map-keys"),
    "missing csv column": (ALPACA, {"a.csv": b"prompt,answer\nx,y\n"}, [],
                           "a.csv, line 2: no column 'instruction', the columns are prompt, answer"),
    "empty file": (ALPACA, {"a.jsonl": b""}, [], "a.jsonl: the file is empty"),
    "empty list": (ALPACA, {"a.json": b"[]"}, [], "nothing to write"),
    "broken line": (ALPACA, {"a.jsonl": lines(GOOD) + b'{"instruction": "x"\n'}, [], "a.jsonl, line 2: broken JSON"),
    "not an object": (ALPACA, {"a.jsonl": lines(GOOD) + b"17\n"}, [], "line 2: a JSON int where an object is needed"),
    "unknown handler": ("AlpacaStyleInstructHandler", {"a.jsonl": lines(GOOD)}, [],
                        f"did you mean {ALPACA}?"),
    "unknown template": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--prompt-type", "qwenn"],
                         "--prompt-type qwenn: no such template; there is chatml, qwen, alpaca, default, empty, auto; "
                         "did you mean qwen?"),
    "no assistant turn": (SHAREGPT, {"a.jsonl": talk(*TURNS) + talk(TURNS[0])}, [],
                          "a.jsonl, line 2: the dialogue has no assistant turn"),
    "no turns": (SHAREGPT, {"a.jsonl": talk()}, [], "no assistant turn"),
    "dropped turns leave none": ("QwenConversationHandler", {"a.jsonl": talk(TURNS[1])}, [], "no assistant turn"),
    "unknown role": (SHAREGPT, {"a.jsonl": talk({"from": "narrator", "value": "x"})}, [],
                     "turn 1 of 'conversations' is spoken by 'narrator'; known are human, user, gpt"),
    "other turn keys": (SHAREGPT, {"a.jsonl": talk({"role": "user", "content": "x"})}, [],
                        "turn 1 of 'conversations' needs 'from' and 'value', it has role, content"),
    "turns that are no list": (SHAREGPT, {"a.jsonl": lines({"conversations": {"from": "human"}})}, [],
                               "column 'conversations' holds a dict where a list is needed"),
    "late system text": (MESSAGES, {"a.jsonl": lines({"messages": [
        {"role": "user", "content": "q"}, {"role": "system", "content": "s"}]})}, [],
        "turn 2 of 'messages' is a system text, which may only come first"),
    "broken tools": (SHAREGPT, {"a.jsonl": talk(*TURNS, tools="[{")}, [], "tools is no valid JSON"),
    "tool without a name": (SHAREGPT, {"a.jsonl": talk(*TURNS, tools=[{"description": "x"}])}, [],
                            "a tool without a name"),
    "broken call": (SHAREGPT, {"a.jsonl": talk({"from": "function_call", "value": "f(x)"})}, [],
                    "a function call is no valid JSON"),
    "call without a name": (SHAREGPT, {"a.jsonl": talk({"from": "function_call", "value": "{}"})}, [],
                            "a function call without a name"),
    "history without pairs": (ALPACA, {"a.jsonl": lines({**GOOD, "history": [["one"]]})}, [],
                              "column 'history' must hold pairs"),
    "moss without chat": ("MOSSInstructionHandler", {"a.jsonl": lines({"conversation": {}})}, [], "no column 'chat'"),
    "half a character": (SHAREGPT, {"a.jsonl": b'{"conversations": [{"from": "gpt", "value": "\\ud83d"}]}\n'}, [],
                         "holds half a character"),
    "pair without rejected": ("AlpacaStylePairwiseHandler", {"a.jsonl": lines({**GOOD, "chosen": "c"})}, [],
                              "no column 'rejected'"),
    "null chosen": ("SharegptStylePairwiseHandler", {"a.jsonl": talk(TURNS[0], chosen=None, rejected="r")}, [],
                    "column 'chosen' is null, so there is no pair"),
    "chosen by the user": ("SharegptStylePairwiseHandler", {"a.jsonl": talk(TURNS[0], chosen=TURNS[0],
                                                                            rejected=TURNS[1])}, [],
                           "column 'chosen' must be an assistant's turn"),
    "pack": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--pack"], "--pack: packing belongs to training, which computes the"),
    "template on text": ("GeneralPretrainHandler", {"a.jsonl": lines({"text": "x"})}, ["--prompt-type", "qwen"],
                         "--prompt-type qwen: GeneralPretrainHandler reads plain text"),
    "qwen1 labels on alpaca": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--prompt-type", "alpaca", "--label-policy", "qwen1"],
                               "--label-policy qwen1 with --prompt-type alpaca"),
    "labels of pairs": ("AlpacaStylePairwiseHandler", {"a.jsonl": lines(GOOD)}, ["--label-policy", "qwen1"],
                        "preference pairs are compared by their last replies alone"),
    "json keys": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--json-keys", "instruction"], "name those of "),
    "overlong error": (ALPACA, {"a.jsonl": lines(GOOD, {**GOOD, "output": "y " * 99})},
                       ["--seq-length", "60", "--overlong", "error"], "a.jsonl, line 2: "),
    "overlong without a length": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--overlong", "truncate"], "give --seq-length"),
    "nothing short enough": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--seq-length", "5"], "1 longer than --seq-length"),
    "broken map": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--map-keys", "{prompt: q}"], "not valid JSON"),
    "unknown key in the map": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--map-keys", '{"promt": "q"}'],
                               "no column is called promt"),
    "unknown tag in the map": (SHAREGPT, {"a.jsonl": talk(*TURNS)}, ["--map-keys", '{"tags": {"who": "x"}}'],
                               "no tag is called who; there is role_tag"),
    "shares without interleaving": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--interleave-probs", "1"],
                                    "has a meaning only with --mix-strategy"),
    "too few shares": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--input", "a.jsonl", "a.jsonl", "--mix-strategy",
                       "interleave_under", "--interleave-probs", "1"], "2 inputs need 2 numbers above 0"),
    "share of zero": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--input", "a.jsonl", "a.jsonl", "--mix-strategy",
                      "interleave_over", "--interleave-probs", "1", "0"], "2 inputs need 2 numbers above 0"),
    "nothing to interleave": (ALPACA, {"a.jsonl": lines(GOOD), "b.json": b"[]"}, ["--input", "a.jsonl", "b.json",
                              "--mix-strategy", "interleave_over"], "b.json: it has no rows to interleave"),
    "no samples": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--max-samples", "0"], "--max-samples 0: must be 1 or more"),
    "no shards": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--n-subs", "0"], "--n-subs 0: must be 1 or more"),
    "no such data folder": (ALPACA, {"a.jsonl": lines(GOOD)}, ["--dataset-dir", "none"], "--dataset-dir none: no such"),
    "not in dataset_info": (LLAMA, {"a.jsonl": lines(GOOD), "dataset_info.json": info(file_name="a.jsonl")},
                            ["--dataset-dir", ".", "--input", "yours"], "neither a data set of dataset_info.json"),
    "a hub's data set": (LLAMA, {"a.jsonl": lines(GOOD), "dataset_info.json": info(hf_hub_url="x/y")},
                         ["--dataset-dir", ".", "--input", "mine"], "has no file_name"),
    "preferences by name": (LLAMA, {"a.jsonl": lines(GOOD), "dataset_info.json": info(file_name="a.jsonl",
                                                                                      ranking=True)},
                            ["--dataset-dir", ".", "--input", "mine"], "it holds preferences (ranking)"),
    "names only one handler follows": (ALPACA, {"a.jsonl": lines(GOOD), "dataset_info.json": info(file_name="a.jsonl")},
                                       ["--dataset-dir", ".", "--input", "mine"], "names only LlamaFactory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_one_sentence_and_leaves_nothing(tmp_path: Path, tokenizer_folder: Path, case: str,
                                                       capsys: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    handler, files, more, said = WRONG[case]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    assert run_command(main, ["--input", next(iter(files)), "--handler-name", handler, "--tokenizer-name-or-path",
                              str(tokenizer_folder), "--output-prefix", "new/deep/set", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1 and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def made(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., str]:
    def call(prefix: str, *more: str, count: int = 3, handler: str = ALPACA) -> str:
        source = tmp_path / "source.jsonl"
        source.write_bytes(lines(*[{**GOOD, "chosen": "c", "rejected": "r"}] * count))
        assert run_command(main, ["--input", str(source), "--handler-name", handler, "--tokenizer-name-or-path",
                                  str(tokenizer_folder), "--output-prefix", str(tmp_path / prefix), *more]) == 0
        return str(tmp_path / prefix)

    return call


def test_the_output_exists(made: Callable[..., str], tmp_path: Path, tokenizer_folder: Path,
                           capsys: pytest.CaptureFixture[str]) -> None:
    made("set")
    capsys.readouterr()
    assert run_command(main, ["--input", str(tmp_path / "source.jsonl"), "--handler-name", ALPACA, "--output-prefix",
                              str(tmp_path / "set"), "--tokenizer-name-or-path", str(tokenizer_folder)]) == 2
    assert "the output exists already; give --overwrite" in capsys.readouterr().err


def test_a_tokenizer_without_the_templates_tokens(tmp_path: Path, tokenizer_folder: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    bare = shutil.copytree(tokenizer_folder, tmp_path / "bare")
    for path in bare.glob("*.json"):
        path.write_text(path.read_text().replace("<|im_start|>", "<|begin|>"))
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    flags = ["--input", str(tmp_path / "a.jsonl"), "--handler-name", ALPACA, "--output-prefix", str(tmp_path / "set"),
             "--tokenizer-name-or-path", str(bare)]
    assert run_command(main, flags) == 2
    assert "has no <|im_start|>; use a tokenizer that has it or another template" in capsys.readouterr().err
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    assert run_command(main, [*flags, "--prompt-type", "auto"]) == 2
    assert "has no chat_template; choose a template by name" in capsys.readouterr().err
    (bare / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    assert run_command(main, [*flags, "--prompt-type", "alpaca"]) == 2
    assert "it ends replies with the tokenizer's eos token" in capsys.readouterr().err


def merged(tmp_path: Path, *keys: str) -> int:
    return run_command(main, ["--input", str(tmp_path / "parts"), "--merge-group-keys", *keys, "--output-prefix",
                              str(tmp_path / "new/all")])


def test_what_cannot_be_merged(made: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f"packed_{name}_document" for name in ("input_ids", "attention_mask", "labels")]
    assert merged(tmp_path, *keys) == 2
    assert "parts: no such folder" in capsys.readouterr().err
    made("parts/a")
    assert merged(tmp_path, "text_document") == 2
    assert "no file in " in capsys.readouterr().err
    made("parts/b", "--prompt-type", "alpaca")
    assert merged(tmp_path, *keys) == 2
    assert "made with template alpaca" in capsys.readouterr().err
    for end in (".bin", ".idx"):
        (tmp_path / f"parts/b_packed_labels_document{end}").unlink()
    assert merged(tmp_path, *keys) == 2
    assert "has files for some of the keys only" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_training_cannot_read(made: Callable[..., str], tmp_path: Path) -> None:
    prefix = made("set")
    with pytest.raises(ConfigError, match="did you mean .*set_packed"):
        InstructionDataset(tmp_path / "sets", (0, 1), None, 1)
    Path(f"{prefix}_packed_labels_document.idx").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match="set_packed_labels_document.idx is missing"):
        InstructionDataset(prefix, (0, 1), None, 1)
    other = made("other", count=4)
    for end in (".bin", ".idx"):
        shutil.copy(f"{other}_packed_labels_document{end}", f"{prefix}_packed_labels_document{end}")
    with pytest.raises(ConfigError, match="the files are not of one run"):
        InstructionDataset(prefix, (0, 1), None, 1)
    pairs = made("pairs", handler="AlpacaStylePairwiseHandler")
    with pytest.raises(ConfigError, match="holds preference pairs, which --stage dpo trains on"):
        InstructionDataset(pairs, (0, 1), None, 1)
    import numpy as np

    text = write_documents(tmp_path / "plain", [np.arange(5, dtype=np.int32)])
    with pytest.raises(ConfigError, match="plain text without labels; remove --is-instruction-dataset"):
        InstructionDataset(text, (0, 1), None, 1)
    with pytest.raises(ConfigError, match="the model's vocabulary has 5 rows"):
        InstructionDataset(other, (0, 4), None, 1, vocab_size=5)[0]
    with pytest.raises(ConfigError, match="leave none for training"):
        build_instruction_datasets(
            data_path=[other], split="1,999,0", train_data_path=None, valid_data_path=None, test_data_path=None,
            vocab_size=1000, num_samples=(4, 0, 0), seq_length=64, seed=1, cache_dir=None, build=True)


@pytest.mark.parametrize(("words", "said"), [
    ([], "the verb is missing"), (["list"], "unknown verb list"), (["show"], "PREFIX is missing"),
    (["show", "none/set"], "no token files lie there"), (["show", "set", "--first", "3"], "has the samples 0 to 2"),
    (["show", "set", "--bins", "0"], "--samples must be 0 or more and --bins 1 or more"),
    (["show", "set_packed_labels_document"], "give --tokenizer-name-or-path"),
    (["show", "set", "--sample", "1"], "did you mean --samples")])
def test_what_cannot_be_shown(made: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    made("set")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run_command(show.main, words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1
