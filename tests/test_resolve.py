"""Merging weights, --model and flags."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from modellink.config import ConfigError
from modellink.config.model import ModelConfig
from modellink.config.settings import parse_settings
from modellink.models.presets.qwen15 import PRESETS, SOURCES
from modellink.models.resolve import resolve_model

TOTALS = {"qwen15-0.5b": 463_987_712, "qwen15-1.8b": 1_836_828_672, "qwen15-4b": 3_950_369_280,
          "qwen15-7b": 7_721_324_544, "qwen15-14b": 14_167_290_880, "qwen15-32b": 32_512_218_112,
          "qwen15-72b": 72_287_920_128, "qwen15-110b": 111_209_914_368}
SMALL = ModelConfig(num_layers=4, hidden_size=96, ffn_hidden_size=160, num_attention_heads=6, num_query_groups=2,
                    vocab_size=1003)


def resolve(line: str, weights: ModelConfig | None = None) -> tuple[ModelConfig, dict[str, str]]:
    return resolve_model(parse_settings("t", "t", line.split()), None if weights is None else ("W", weights))


def problems(line: str, weights: ModelConfig | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve(line, weights)
    return error.value.problems


def write_config(folder: Path, config: ModelConfig, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**config.to_hf(), **changes}))
    return path


def test_presets_have_the_published_sizes() -> None:
    assert {name: preset.num_parameters for name, preset in PRESETS.items()} == TOTALS
    assert set(SOURCES) == set(PRESETS) and all(source.endswith("config.json") for source in SOURCES.values())
    assert PRESETS["qwen15-4b"].rope_theta == 5e6 and PRESETS["qwen15-72b"].rms_norm_eps == 1e-5
    assert [name for name, preset in PRESETS.items() if preset.tie_word_embeddings] == ["qwen15-0.5b"]


def test_a_preset_fills_the_architecture() -> None:
    model, origins = resolve("--model qwen15-32B")
    assert model == PRESETS["qwen15-32b"]
    assert set(origins.values()) == {"preset qwen15-32b"}
    assert set(origins) == {field.name for field in dataclasses.fields(ModelConfig)}


def test_a_config_or_its_folder_fills_the_architecture(tmp_path: Path) -> None:
    path = write_config(tmp_path / "m", SMALL)
    for word in (path, path.parent):
        model, origins = resolve(f"--model {word}")
        assert model == SMALL and origins["num_layers"] == str(path)


FLAGS = {
    "--num-layers 5": "num_layers is 4", "--hidden-size 90": "hidden_size is 96",
    "--ffn-hidden-size 9": "ffn_hidden_size is 160", "--num-attention-heads 3": "num_attention_heads is 6",
    "--num-query-groups 3": "num_query_groups is 2", "--vocab-size 1004": "vocab_size is 1003",
    "--rotary-base 10000": "rope_theta is 1000000.0", "--norm-epsilon 1e-05": "rms_norm_eps is 1e-06",
    "--no-untie-embeddings-and-output-weights": "tie_word_embeddings is False",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_contradicts_weights_shows_both(flag: str) -> None:
    assert problems(flag, SMALL) == [f"{flag} contradicts W, where {FLAGS[flag]}: "
                                     "leave the flag out, or name the model it describes."]


def test_the_old_name_of_epsilon_contradicts_too() -> None:
    assert "rms_norm_eps is 1e-06" in problems("--layernorm-epsilon 1e-5", SMALL)[0]


@pytest.mark.parametrize("line", [
    "--num-layers 4 --hidden-size 96 --ffn-hidden-size 160 --num-attention-heads 6 --num-query-groups 2 "
    "--group-query-attention --kv-channels 16 --vocab-size 1003 --rotary-base 1e6 --norm-epsilon 1e-6 "
    "--untie-embeddings-and-output-weights --disable-bias-linear --add-qkv-bias --normalization RMSNorm --swiglu",
    "--group-query-attention", "--no-bias-linear", ""])
def test_flags_that_restate_the_weights_are_fine(line: str) -> None:
    model, origins = resolve(line, SMALL)
    assert model == SMALL and set(origins.values()) == {"W"}


@pytest.mark.parametrize("flag, said", [
    ("--kv-channels 8", "--kv-channels 8 contradicts the head size 16"),
    ("--no-group-query-attention", "--no-group-query-attention contradicts W, which has 6 heads and 2 groups"),
    ("--no-add-qkv-bias", "a bias on query, key and value"), ("--add-bias-linear", "none outside query, key and value"),
    ("--normalization LayerNorm", "RMSNorm"), ("--no-swiglu", "SwiGLU"), ("--rotary-percent 0.5", "1.0"),
    ("--no-use-rotary-position-embeddings", "rotary positions")])
def test_what_no_qwen15_has_is_an_error(flag: str, said: str) -> None:
    found = problems(flag, SMALL)
    assert len(found) == 1 and said in found[0]


def test_wishes_never_conflict() -> None:
    model, origins = resolve("--max-position-embeddings 77 --init-method-std 0.01 --attention-dropout 0.5 "
                             "--make-vocab-size-divisible-by 64 --padded-vocab-size 1024 --bf16", SMALL)
    assert model == dataclasses.replace(SMALL, max_position_embeddings=77, initializer_range=0.01)
    assert origins["initializer_range"] == "--init-method-std" and origins["num_layers"] == "W"


def test_weights_win_over_a_preset_of_their_shape() -> None:
    chat = dataclasses.replace(PRESETS["qwen15-72b"], rms_norm_eps=1e-6, max_position_embeddings=4096)
    model, origins = resolve("--model qwen15-72b", chat)
    assert model == chat and origins["rms_norm_eps"] == "W"


def test_a_preset_of_another_shape_is_an_error() -> None:
    found = problems("--model qwen15-7b", PRESETS["qwen15-1.8b"])
    assert [line for line in found if "num_layers is 32 in preset qwen15-7b, but 24 in the weights of W" in line]
    assert all("of another architecture" in line for line in found)


def test_a_config_that_contradicts_weights_is_an_error(tmp_path: Path) -> None:
    path = write_config(tmp_path / "m", SMALL, rms_norm_eps=1e-5)
    found = problems(f"--model {path}", SMALL)
    assert found == [f"--model: rms_norm_eps is 1e-05 in {path}, but 1e-06 in the weights of W: they are of another "
                     "architecture; name their model or load other weights."]


def test_all_contradictions_come_at_once() -> None:
    assert len(problems("--num-layers 5 --vocab-size 9 --no-swiglu", SMALL)) == 3


def test_flags_alone_make_a_model_or_name_what_is_missing() -> None:
    model, origins = resolve("--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 "
                             "--vocab-size 100 --untie-embeddings-and-output-weights")
    assert model == ModelConfig(2, 64, 96, 4, 4, 100)
    assert origins["num_layers"] == "--num-layers" and origins["rms_norm_eps"] == "default"
    found = problems("--num-layers 2 --vocab-size 100")
    assert len(found) == 1 and "describe the architecture with --hidden-size, --ffn-hidden-size, " in found[0]


@pytest.mark.parametrize("name, said", [
    ("qwen15-7", "--model qwen15-7: no such preset or path; did you mean qwen15-7b?"),
    ("nowhere/config.json", "no such file or folder")])
def test_an_unknown_model_is_one_sentence(name: str, said: str) -> None:
    found = problems(f"--model {name}")
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize("content, said", [
    ("<!DOCTYPE html><html>", "this is an HTML page"),
    ("version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ("{", "not valid JSON"), ("[1]", "holds a JSON object, this holds a list"), ("", "the file is empty"),
    ('{"model_type": "llama"}', "model_type is 'llama'"),
    ('{"model_type": "qwen2"}', "must be a whole number above 0")])
def test_a_config_that_is_none_is_one_sentence(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    found = problems(f"--model {tmp_path}")
    assert len(found) == 1 and said in found[0] and str(path) in found[0]
