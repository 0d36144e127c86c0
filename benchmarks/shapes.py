"""The models that are measured: two small ones made up for CPUs, and the sizes of Qwen1.5."""

import argparse
from typing import Any

from flags import number

from modellink.models.presets.qwen15 import PRESETS

_SMALL: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 32000, "max_position_embeddings": 2048,
                          "rope_theta": 10000.0}
TRAINING = _SMALL | {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
                     "num_key_value_heads": 8, "tie_word_embeddings": False}
GENERATION = _SMALL | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6,
                       "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True}
NAMES = ("small", "0.5b", "1.8b", "4b", "7b")


def add_shape(parser: argparse.ArgumentParser, small: str) -> None:
    """`--shape` and `--layers`; `small` says what the small model is."""
    parser.add_argument("--shape", choices=NAMES, default="small", help=f"small ({small}), or a size of Qwen1.5")
    parser.add_argument("--layers", type=number, help="this many layers of the shape (default: all)")


def shape_of(name: str, small: dict[str, Any], *, layers: int | None = None, positions: int = 0) -> dict[str, Any]:
    """The config.json of a shape.

    Args:
        name: one of `NAMES`.
        small: the model called small.
        layers: as many layers of it; None: all.
        positions: tokens of a sequence that it must be able to hold.
    """
    shape = small if name == "small" else PRESETS[f"qwen15-{name}"].to_hf()
    return shape | {"num_hidden_layers": layers or shape["num_hidden_layers"],
                    "max_position_embeddings": max(positions, shape["max_position_embeddings"])}
