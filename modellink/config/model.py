"""The architecture of a Qwen1.5 model, in the words of this project, and its way from and to a HF config.json."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from modellink.config.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """What the weights mean: every field changes what loaded weights compute, except the last three.

    All Qwen1.5 models use RMSNorm, SwiGLU (SiLU), rotary positions over the full head size (half-rotated),
    a bias on query, key and value and none elsewhere.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int  # rows of the embedding table in the HF folder (151936 or 152064), not the tokenizer's words
    tie_word_embeddings: bool = False
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    add_qkv_bias: bool = True
    # wishes: they do not change what given weights compute
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    dtype: str = "bfloat16"  # of the published weights: float32, bfloat16 or float16

    def __post_init__(self) -> None:
        problems = []
        if self.hidden_size % self.num_attention_heads:
            problems.append(f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                            f"{self.num_attention_heads}: the size of a head would not be whole; correct one of them.")
        if self.num_attention_heads % self.num_query_groups:
            problems.append(f"num_attention_heads {self.num_attention_heads} is not divisible by num_query_groups "
                            f"{self.num_query_groups}: each group needs the same number of heads; correct one of them.")
        if problems:
            raise ConfigError(problems)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """Total parameters with the embedding counted once when it is tied and without padding rows."""
        kv_size = self.num_query_groups * self.head_dim
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * kv_size
        if self.add_qkv_bias:
            attention += self.hidden_size + 2 * kv_size
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + tables + self.hidden_size

    def padded_vocab_size(self, tensor_parallel: int, divisible_by: int = 1) -> int:
        """Vocabulary rows padded up to a multiple of tensor_parallel x divisible_by."""
        multiple = tensor_parallel * divisible_by
        return -(-self.vocab_size // multiple) * multiple

    @classmethod
    def from_hf(cls, config: dict[str, Any], origin: str) -> "ModelConfig":
        """Read the dictionary of a HF config.json of type qwen2 (transformers 4 or 5 spelling).

        Args:
            config: the parsed file.
            origin: where it came from, for error messages.

        Raises:
            ConfigError: another model type, a missing field or an architecture that Qwen1.5 does not have.
        """
        if config.get("model_type") != "qwen2":
            raise ConfigError(f"{origin}: model_type is {config.get('model_type')!r}, but this program runs "
                              "'qwen2' (Qwen1.5) models only; give the folder of a Qwen1.5 model.")
        needed = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]
        missing = [name for name in needed if not isinstance(config.get(name), int) or config[name] < 1]
        if missing:
            raise ConfigError(f"{origin}: {', '.join(missing)} must be a whole number above 0; "
                              "the file is incomplete, fetch it again.")
        if config.get("use_sliding_window"):
            raise ConfigError(f"{origin}: use_sliding_window is true, but no Qwen1.5 model uses it; "
                              "set it to false if the weights were trained with full attention.")
        if config.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{origin}: hidden_act is {config['hidden_act']!r}, but Qwen1.5 uses 'silu'.")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ConfigError(f"{origin}: rope type {rope.get('rope_type', rope.get('type'))!r} is not supported; "
                              "Qwen1.5 uses the default rotary embedding.")
        theta = config.get("rope_theta", rope.get("rope_theta", 10000.0))
        head_dim = config.get("head_dim")
        if head_dim and head_dim * config["num_attention_heads"] != config["hidden_size"]:
            raise ConfigError(f"{origin}: head_dim {head_dim} times num_attention_heads "
                              f"{config['num_attention_heads']} is not hidden_size {config['hidden_size']}; "
                              "Qwen1.5 heads fill the hidden size.")
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rope_theta=float(theta),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(config.get("max_position_embeddings", 32768)),
            initializer_range=float(config.get("initializer_range", 0.02)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )

    def to_hf(self) -> dict[str, Any]:
        """The HF config.json dictionary of this model, with both spellings of what transformers 5 renamed."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.ffn_hidden_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_query_groups,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "dtype": self.dtype,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
