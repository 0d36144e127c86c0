"""Loading tokenizers from local folders, and the small one we train."""

import json
import shutil
from pathlib import Path

import pytest
from data_helpers import make_tokenizer, topics
from transformers import AutoTokenizer

from modellink.config import ConfigError
from modellink.data.tokenizer import eod_id, load_tokenizer
from modellink.data.train_tokenizer import SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "tokenizer"))


def test_auto_tokenizer_loads_it_as_qwen2(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert len(tokenizer) == 800
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [797, 798, 799]
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("text", [
    "It's 2024: we'LL see.\n\n\n  def f(x):\n\treturn x ** 2  ", "你好，世界 😀 e\u0301",
    "<|im_start|>user\nhi<|im_end|>"])
def test_text_survives_and_digits_stay_single(trained: Path, text: str) -> None:
    tokenizer = load_tokenizer(trained)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text.replace("e\u0301", "\u00e9")  # NFC
    assert not any(sum(character.isdigit() for character in tokenizer.decode([token])) > 1 for token in ids)
    assert (798 in ids) == ("<|im_start|>" in text)


def test_the_saved_file_and_transformers_agree(trained: Path) -> None:
    from tokenizers import Tokenizer

    plain, tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json")), load_tokenizer(trained)
    for text in topics()[:25]:
        assert plain.encode(text).ids == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(("messages", "start"), [
    ([{"role": "user", "content": "hi"}], "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
     "<|im_start|>system\nBe brief.<|im_end|>\n")])
def test_chat_template(trained: Path, messages: list[dict[str, str]], start: str) -> None:
    tokenizer = load_tokenizer(trained)
    turns = start + "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == turns
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) \
        == turns + "<|im_start|>assistant\n"


def test_end_of_document(trained: Path, folder: Path) -> None:
    assert eod_id(load_tokenizer(trained)) == 797
    state = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|done|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer.json").write_text(state)
    for eos, pad in (("<|im_end|>", "<|im_end|>"), (None, None)):
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {**config, "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<|im_start|>",
             "eos_token": eos, "pad_token": pad}))
        tokenizer = load_tokenizer(folder)
        if eos:
            assert eod_id(tokenizer) == tokenizer.eos_token_id
        else:
            with pytest.raises(ConfigError, match="neither <|endoftext|> nor an eos token"):
                eod_id(tokenizer)


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 259"):
        train_tokenizer(["x"], 258, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_vocab_and_merges_are_enough(trained: Path, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    text = "for x in range(10): print(x)"
    assert load_tokenizer(folder)(text)["input_ids"] == load_tokenizer(trained)(text)["input_ids"]


def test_no_hub_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="Qwen/Qwen1.5-7B: no such tokenizer folder"):
        load_tokenizer("Qwen/Qwen1.5-7B")


@pytest.mark.parametrize(("file", "text", "said"), [
    ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
    ("tokenizer_config.json", "<!DOCTYPE html><html></html>", "HTML page"),
    ("merges.txt", "", "empty"),
    ("vocab.json", '{"a": 0', "not valid JSON"),
])
def test_files_that_are_not_what_they_claim(folder: Path, file: str, text: str, said: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_tokenizer(folder)
    assert file in caught.value.problems[0]


def test_folders_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {folder}"):
        load_tokenizer(tmp_path / "tokeniser")
    with pytest.raises(ConfigError, match="a tokenizer is a folder"):
        load_tokenizer(folder / "tokenizer.json")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no tokenizer files.*found config\.json"):
        load_tokenizer(bare)
