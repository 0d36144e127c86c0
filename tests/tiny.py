"""Tiny random Qwen1.5 models made by transformers' own classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

# odd on purpose: a vocabulary and a head count that are no powers of two
TINY: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}


def tiny_config(**changes: Any) -> Qwen2Config:
    """A Qwen2Config of the TINY sizes with `changes`."""
    values = {**TINY, **changes}
    theta = values.pop("rope_theta")
    # no padding token: transformers would train no embedding for it, and every token counts here
    return Qwen2Config(**values, rope_parameters={"rope_theta": theta, "rope_type": "default"},
                       bos_token_id=0, eos_token_id=0, pad_token_id=None, use_sliding_window=False)


def tiny_model(seed: int = 1234, dtype: torch.dtype = torch.float32, **changes: Any) -> Qwen2ForCausalLM:
    """A random model whose biases and norms are random too, so that a lost or swapped one shows."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "norm" in name:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 0.08)
    model.tie_weights()
    return model.to(dtype).eval()


def save_tiny(folder: Path, seed: int = 1234, dtype: torch.dtype = torch.float32, **changes: Any) -> Qwen2ForCausalLM:
    """Write a tiny model as a HF folder and return it."""
    model = tiny_model(seed, dtype, **changes)
    model.save_pretrained(folder)
    return model
