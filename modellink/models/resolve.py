"""Merges loaded weights, `--model` and flags into one architecture, and says where each value came from.

Loaded weights win over a preset. A flag may restate a value; a flag that says something else is a contradiction.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink.config.errors import ConfigError, ProblemList
from modellink.config.files import near_path_hint, read_json
from modellink.config.model import ModelConfig
from modellink.config.settings import ModelSettings, Settings
from modellink.models.presets.qwen15 import PRESETS

# ModelConfig field -> (flag, settings field), for flags that state the value itself
DIRECT_FLAGS: dict[str, tuple[str, str]] = {
    "num_layers": ("--num-layers", "num_layers"),
    "hidden_size": ("--hidden-size", "hidden_size"),
    "ffn_hidden_size": ("--ffn-hidden-size", "ffn_hidden_size"),
    "num_attention_heads": ("--num-attention-heads", "num_attention_heads"),
    "num_query_groups": ("--num-query-groups", "num_query_groups"),
    "vocab_size": ("--vocab-size", "vocab_size"),
    "rope_theta": ("--rotary-base", "rotary_base"),
    "rms_norm_eps": ("--norm-epsilon", "norm_epsilon"),
}
# fields that make it another model, not another edition of the same one
SHAPE_FIELDS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
# fields that change what given weights compute
WEIGHT_FIELDS = (*SHAPE_FIELDS, "vocab_size", "tie_word_embeddings", "rope_theta", "rms_norm_eps", "add_qkv_bias")
NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Source:
    """A whole architecture and where it came from."""

    origin: str
    config: ModelConfig
    is_preset: bool = False


def resolve_model(settings: Settings, weights: tuple[str, ModelConfig] | None) -> tuple[ModelConfig, dict[str, str]]:
    """The architecture of a run.

    Args:
        settings: the command line.
        weights: (where they lie, their architecture) of the weights the run loads, or None.

    Returns:
        The architecture, and for each of its fields where the value came from.

    Raises:
        ConfigError: contradictions, each with both values and both origins; an unknown `--model`; or flags that
            do not fill an architecture when there is neither `--model` nor weights.
    """
    problems = ProblemList()
    named = named_model(settings.model.model) if settings.model.model is not None else None
    base = named
    if weights is not None:
        base = Source(*weights)
        if named is not None:
            _compare_sources(base, named, problems)
    _check_family(settings, problems)
    if base is None:
        problems.raise_if_any()
        base = _from_flags(settings)
    else:
        _compare_flags(base, settings, problems)
    problems.raise_if_any()
    return _apply_wishes(base, settings)


def named_model(name: str) -> Source:
    """The architecture that `--model NAME` means: a preset, a config.json or its folder."""
    if name.lower() in PRESETS:
        return Source(f"preset {name.lower()}", PRESETS[name.lower()], is_preset=True)
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        if near and "/" not in name:
            raise ConfigError(f"--model {name}: no such preset or path; did you mean {near[0]}?")
        raise ConfigError(f"--model {name}: no such file or folder{near_path_hint(path)}, and it is none of the "
                          f"presets {', '.join(PRESETS)}.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a config.json holds a JSON object, this holds a {type(config).__name__}; "
                          "give the config.json of a Qwen1.5 model.")
    return Source(str(path), ModelConfig.from_hf(config, str(path)))


def _compare_sources(weights: Source, named: Source, problems: ProblemList) -> None:
    # a preset describes one edition; weights of the same shape may be another one, and they know best
    fields = SHAPE_FIELDS if named.is_preset else WEIGHT_FIELDS
    for field in fields:
        have, want = getattr(weights.config, field), getattr(named.config, field)
        if have != want:
            problems.add(f"--model: {field} is {want} in {named.origin}, but {have} in the weights of "
                         f"{weights.origin}: they are of another architecture; name their model or load other weights.")


def _claims(model: ModelSettings, given: frozenset[str]) -> list[tuple[str, str, Any]]:
    """What the given flags say: (ModelConfig field, flag as typed, value)."""
    claims: list[tuple[str, str, Any]] = []
    for field, (flag, name) in DIRECT_FLAGS.items():
        value = getattr(model, name)
        if value is not None:
            claims.append((field, f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}", value))
    if "untie_embeddings_and_output_weights" in given:
        untied = model.untie_embeddings_and_output_weights
        claims.append(("tie_word_embeddings", "--untie-embeddings-and-output-weights" if untied
                       else "--no-untie-embeddings-and-output-weights", not untied))
    return claims


def _compare_flags(base: Source, settings: Settings, problems: ProblemList) -> None:
    model, given = settings.model, settings.given
    for field, flag, value in _claims(model, given):
        have = getattr(base.config, field)
        if value != have:
            problems.add(f"{flag} contradicts {base.origin}, where {field} is {have}: "
                         "leave the flag out, or name the model it describes.")
    if model.kv_channels is not None and model.kv_channels != base.config.head_dim:
        problems.add(f"--kv-channels {model.kv_channels} contradicts the head size {base.config.head_dim} of "
                     f"{base.origin}: leave the flag out.")
    if "group_query_attention" in given and model.num_query_groups is None:
        grouped = base.config.num_query_groups < base.config.num_attention_heads
        if model.group_query_attention != grouped:
            flag = "--group-query-attention" if model.group_query_attention else "--no-group-query-attention"
            problems.add(f"{flag} contradicts {base.origin}, which has {base.config.num_attention_heads} heads and "
                         f"{base.config.num_query_groups} groups: leave the flag out.")


def _check_family(settings: Settings, problems: ProblemList) -> None:
    """Flags that ask for something no Qwen1.5 model has."""
    model = settings.model
    for wrong, flag, value, truth in (
        (not model.add_qkv_bias, "--no-add-qkv-bias", "no bias", "a bias on query, key and value"),
        (model.bias_linear, "--add-bias-linear", "a bias on every linear layer", "none outside query, key and value"),
        (model.normalization != "RMSNorm", "--normalization", model.normalization, "RMSNorm"),
        (not model.swiglu, "--no-swiglu", "another activation", "SwiGLU"),
        (not model.use_rotary_position_embeddings, "--no-use-rotary-position-embeddings", "no rotary positions",
         "rotary positions"),
        (model.rotary_percent != 1.0, "--rotary-percent", model.rotary_percent, "1.0 (the whole head is rotated)"),
    ):
        if wrong:
            problems.add(f"{flag} asks for {value}, but every Qwen1.5 model has {truth}: leave the flag out.")


def _from_flags(settings: Settings) -> Source:
    """An architecture from flags alone."""
    model = settings.model
    missing = [flag for field, (flag, name) in DIRECT_FLAGS.items()
               if field in NEEDED and getattr(model, name) is None
               # rows may be stated in their padded form
               and not (field == "vocab_size" and model.padded_vocab_size is not None)]
    if missing:
        raise ConfigError(f"--model is missing: give a preset (--model qwen15-7b) or a config.json, load a checkpoint, "
                          f"or describe the architecture with {', '.join(missing)}.")
    values = {field: value for field, _, value in _claims(model, settings.given)}
    values.setdefault("vocab_size", model.padded_vocab_size)
    values.setdefault("num_query_groups", values["num_attention_heads"])
    # Megatron-LM ties unless told not to
    values.setdefault("tie_word_embeddings", True)
    return Source("flags", ModelConfig(**values))


def _apply_wishes(base: Source, settings: Settings) -> tuple[ModelConfig, dict[str, str]]:
    model = settings.model
    origins = {field.name: base.origin for field in dataclasses.fields(ModelConfig)}
    if base.origin == "flags":
        stated = {field for field, _, _ in _claims(model, settings.given)}
        origins = {name: DIRECT_FLAGS[name][0] if name in stated and name in DIRECT_FLAGS else "default"
                   for name in origins}
        if "tie_word_embeddings" in stated:
            origins["tie_word_embeddings"] = "--untie-embeddings-and-output-weights"
        if "vocab_size" not in stated:
            origins["vocab_size"] = "--padded-vocab-size"
    wishes: dict[str, Any] = {}
    for field, flag, value in (
        ("max_position_embeddings", "--max-position-embeddings", model.max_position_embeddings),
        ("initializer_range", "--init-method-std", model.init_method_std),
    ):
        if value is not None:
            wishes[field] = value
            origins[field] = flag
    return dataclasses.replace(base.config, **wishes), origins
