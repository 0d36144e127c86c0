"""Small random HF folders for the converter's tests, and Megatron's packing written by hand, without our rule table."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES: dict[str, Any] = {"layers": 4, "hidden": 24, "ffn": 40, "heads": 6, "groups": 2, "vocab": 101, "tie": False}


def hf_state(dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """Random weights under HF names."""
    size = {**SIZES, **changes}
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = size["hidden"], size["ffn"]
    kv = hidden // size["heads"] * size["groups"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["vocab"], hidden)}
    for layer in range(size["layers"]):
        name = f"model.layers.{layer}."
        for letter, rows in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{name}self_attn.{letter}_proj.weight"] = (rows, hidden)
            shapes[f"{name}self_attn.{letter}_proj.bias"] = (rows,)
        shapes[f"{name}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{name}mlp.gate_proj.weight"] = shapes[f"{name}mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{name}mlp.down_proj.weight"] = (hidden, ffn)
        shapes[f"{name}input_layernorm.weight"] = shapes[f"{name}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not size["tie"]:
        shapes["lm_head.weight"] = (size["vocab"], hidden)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def hf_config(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, Any]:
    """The config.json of those weights, in the spelling that Qwen1.5 was published in."""
    size = {**SIZES, **changes}
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "hidden_size": size["hidden"], "intermediate_size": size["ffn"], "num_hidden_layers": size["layers"],
            "num_attention_heads": size["heads"], "num_key_value_heads": size["groups"], "vocab_size": size["vocab"],
            "tie_word_embeddings": size["tie"], "rope_theta": 5000000.0, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512, "initializer_range": 0.02, "use_sliding_window": False,
            "torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.37.0"}


def make_hf(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """Write a HF folder with tokenizer files; returns its weights."""
    folder.mkdir(parents=True)
    state = hf_state(dtype, seed, **changes)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(dtype, **changes)))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    return state


def load_hf(folder: Path) -> dict[str, Tensor]:
    """All tensors of a HF folder's shards."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def packed_by_hand(state: dict[str, Tensor], layers: list[int], tensor: int, rank: int, *, first: bool, last: bool,
                   padded: int, groups: int, head: str | None) -> dict[str, Tensor]:
    """What one rank's model chunk must hold, by reshaping whole tensors."""
    def rows(table: Tensor) -> Tensor:
        zeros = table.new_zeros(padded - table.shape[0], table.shape[1])
        return torch.cat([table, zeros]).chunk(tensor)[rank]

    def grouped(name: str, kind: str) -> Tensor:
        parts = [state[f"{name}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
        by_group = torch.cat([part.reshape(groups, part.shape[0] // groups, -1) for part in parts], dim=1)
        return by_group.reshape(-1, *parts[0].shape[1:]).chunk(tensor)[rank]

    out = {}
    if first:
        out["embedding.word_embeddings.weight"] = rows(state["model.embed_tokens.weight"])
    for local, layer in enumerate(layers):
        hf, mg = f"model.layers.{layer}.", f"decoder.layers.{local}."
        out[f"{mg}input_layernorm.weight"] = state[f"{hf}input_layernorm.weight"]
        out[f"{mg}self_attention.linear_proj.weight"] = state[f"{hf}self_attn.o_proj.weight"].chunk(tensor, 1)[rank]
        out[f"{mg}self_attention.linear_qkv.weight"] = grouped(hf, "weight")
        out[f"{mg}self_attention.linear_qkv.bias"] = grouped(hf, "bias")
        out[f"{mg}pre_mlp_layernorm.weight"] = state[f"{hf}post_attention_layernorm.weight"]
        gate, up = state[f"{hf}mlp.gate_proj.weight"], state[f"{hf}mlp.up_proj.weight"]
        out[f"{mg}mlp.linear_fc1.weight"] = torch.cat([gate.chunk(tensor)[rank], up.chunk(tensor)[rank]])
        out[f"{mg}mlp.linear_fc2.weight"] = state[f"{hf}mlp.down_proj.weight"].chunk(tensor, 1)[rank]
    if last:
        out["decoder.final_layernorm.weight"] = state["model.norm.weight"]
        if head:
            out["output_layer.weight"] = rows(state[head])
    return out


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder with its size, to see that nothing was left behind or changed."""
    return {str(path.relative_to(folder)): path.stat().st_size if path.is_file() else -1
            for path in sorted(folder.rglob("*"))}
