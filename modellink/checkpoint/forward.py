"""Forward passes straight from weights on disk, one matrix at a time, in fp64: the proof that two folders agree.

A HF folder is read as transformers reads it, a Megatron checkpoint as Megatron's ranks do: packed query, key and value
are taken apart by groups, each rank has its heads and its gate and up rows, and partial outputs are added. Of these two
nothing uses the rule table, so a mistake in it shows. Merged weights, and adapters beside their base, are read in HF
coordinates.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from modellink.checkpoint.chunks import Source
from modellink.checkpoint.hf import HFFolder
from modellink.checkpoint.megatron import MegatronCheckpoint
from modellink.checkpoint.merged import BLOCK_ELEMENTS, MergedSource
from modellink.checkpoint.qwen15 import EMBEDDING, HEAD, hf_rules
from modellink.checkpoint.rules import HFTensor, Rule
from modellink.config.model import ModelConfig
from modellink.ops.attention import attention
from modellink.ops.rms_norm import rms_norm
from modellink.ops.rotary import apply_rotary, rotary_table
from modellink.ops.swiglu import swiglu


class Forward(ABC):
    """The passes of one folder.

    Args:
        model: the architecture.
        dtype: weights are rounded to it first, as a conversion with `--params-dtype` does; None takes them as they are.
    """

    ranks = 1

    def __init__(self, model: ModelConfig, dtype: torch.dtype | None):
        self.model = model
        self.dtype = dtype
        self.table = rotary_table(256, model.head_dim, model.rope_theta, dtype=torch.float64)

    # what a kind of folder knows
    @abstractmethod
    def tables(self, name: str) -> list[Tensor]:
        """Parts of the embedding or the head that follow one another, [rows, hidden]."""

    @abstractmethod
    def norm(self, layer: int | None, which: int) -> Tensor:
        """The first (0) or second (1) norm of a layer, or the final norm for layer None."""

    @abstractmethod
    def heads(self, layer: int, rank: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of one rank for x [s, hidden]: [s, heads or groups, head_dim]."""

    @abstractmethod
    def gate_up(self, layer: int, rank: int, x: Tensor) -> Tensor:
        """[s, 2 x width of the rank], gate first."""

    @abstractmethod
    def back(self, layer: int, rank: int, which: str, x: Tensor) -> Tensor:
        """The layer behind attention (`proj`) or the activation (`down`): [s, width of the rank] -> [s, hidden]."""

    # what all share
    def embed(self, ids: Tensor) -> Tensor:
        """[s] -> [s, hidden]."""
        parts = self.tables(EMBEDDING)
        out, start = torch.empty(len(ids), self.model.hidden_size, dtype=torch.float64), 0
        for part in parts:
            mine = (ids >= start) & (ids < start + part.shape[0])
            out[mine] = self._wide(part[ids[mine] - start])
            start += part.shape[0]
        return out

    def layer(self, layer: int, x: Tensor) -> Tensor:
        """[s, hidden] -> [s, hidden]."""
        eps, table = self.model.rms_norm_eps, self.table[:, :x.shape[0]]
        h = rms_norm(x, self._wide(self.norm(layer, 0)), eps)
        out = torch.zeros_like(x)
        for rank in range(self.ranks):
            query, key, value = (part[:, None] for part in self.heads(layer, rank, h))  # [s, 1, heads, head_dim]
            context = attention(apply_rotary(query, table), apply_rotary(key, table), value)[:, 0]
            out += self.back(layer, rank, "proj", context)
        x = x + out
        h = rms_norm(x, self._wide(self.norm(layer, 1)), eps)
        out = torch.zeros_like(x)
        for rank in range(self.ranks):
            out += self.back(layer, rank, "down", swiglu(self.gate_up(layer, rank, h)))
        return x + out

    def logits(self, x: Tensor) -> Tensor:
        """[s, hidden] -> [s, vocabulary]."""
        x = rms_norm(x, self._wide(self.norm(None, 0)), self.model.rms_norm_eps)
        parts = self.tables(EMBEDDING if self.model.tie_word_embeddings else HEAD)
        return torch.cat([self.linear(x, part) for part in parts], dim=-1)[:, :self.model.vocab_size]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[s, in] times [out, in] -> [s, out]; the matrix is widened to fp64 some rows at a time."""
        rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
        out = torch.cat([x @ self._wide(block).T for block in weight.split(rows)], dim=-1)
        return out if bias is None else out + self._wide(bias)

    def _wide(self, tensor: Tensor) -> Tensor:
        return (tensor if self.dtype is None else tensor.to(self.dtype)).double()


class HFForward(Forward):
    """From HF tensors.

    Args:
        get: gives a whole tensor by name.
    """

    def __init__(self, get: Callable[[str], Tensor], model: ModelConfig, dtype: torch.dtype | None):
        super().__init__(model, dtype)
        self.get = get

    def _get(self, layer: int | None, name: str) -> Tensor:
        return self.get(name if layer is None else f"model.layers.{layer}.{name}")

    def project(self, layer: int, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """One projection: [s, in] -> [s, out]."""
        return self.linear(x, self._get(layer, f"{name}.weight"), bias)

    def tables(self, name: str) -> list[Tensor]:
        return [self._get(None, name)]

    def norm(self, layer: int | None, which: int) -> Tensor:
        if layer is None:
            return self._get(None, "model.norm.weight")
        return self._get(layer, ("input_layernorm.weight", "post_attention_layernorm.weight")[which])

    def heads(self, layer: int, rank: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for letter in "qkv":
            name = f"self_attn.{letter}_proj"
            bias = self._get(layer, f"{name}.bias") if self.model.add_qkv_bias else None
            parts.append(self.project(layer, name, x, bias).unflatten(-1, (-1, self.model.head_dim)))
        return parts[0], parts[1], parts[2]

    def gate_up(self, layer: int, rank: int, x: Tensor) -> Tensor:
        return torch.cat([self.project(layer, f"mlp.{name}_proj", x) for name in ("gate", "up")], -1)

    def back(self, layer: int, rank: int, which: str, x: Tensor) -> Tensor:
        return self.project(layer, {"proj": "self_attn.o_proj", "down": "mlp.down_proj"}[which], x)


class LiveForward(HFForward):
    """From a base with its adapters beside it as PEFT has them, nothing merged."""

    def __init__(self, source: MergedSource, model: ModelConfig):
        super().__init__(partial(whole_tensor, source.base, hf_rules(model)), model, None)
        self.adapters = {tensor.name: tensor for tensor in source.adapters.peft_tensors()}
        self.scale = source.adapters.config.plan.scaling

    def tables(self, name: str) -> list[Tensor]:
        whole = self.adapters.get(f"base_model.model.{name}")
        return [whole.tensor()] if whole else super().tables(name)

    def project(self, layer: int, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = self._get(layer, f"{name}.weight")
        out = self.linear(x, weight)
        a, b, magnitude = (self._adapter(layer, name, part)
                           for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
        if a is not None and b is not None:
            out += self.scale * (x @ a.T @ b.T)
        if a is not None and b is not None and magnitude is not None:
            rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
            lengths = [torch.linalg.vector_norm(block.double() + self.scale * (outer @ a), dim=1)
                       for block, outer in zip(weight.split(rows), b.split(rows))]
            out *= magnitude / torch.cat(lengths)
        return out if bias is None else out + self._wide(bias)

    def _adapter(self, layer: int, name: str, part: str) -> Tensor | None:
        tensor = self.adapters.get(f"base_model.model.model.layers.{layer}.{name}.{part}")
        return None if tensor is None else tensor.tensor().double()


class MegatronForward(Forward):
    """From the rank files of a Megatron checkpoint."""

    def __init__(self, source: MegatronCheckpoint, model: ModelConfig, dtype: torch.dtype | None):
        super().__init__(model, dtype)
        self.source = source
        self.ranks = source.layout.tensor
        layout = source.layout
        self._places = {layer: (stage, chunk, local)
                        for stage in range(layout.pipeline) for chunk in range(layout.chunks)
                        for local, layer in enumerate(layout.layer_indices(model.num_layers, stage, chunk))}
        self._last = layout.pipeline - 1, layout.chunks - 1

    def _get(self, layer: int, rank: int, name: str) -> Tensor:
        stage, chunk, local = self._places[layer]
        return self.source.chunk_state(rank, stage, chunk)[f"decoder.layers.{local}.{name}"]

    def tables(self, name: str) -> list[Tensor]:
        if name == EMBEDDING:
            return [self.source.chunk_state(rank, 0, 0)["embedding.word_embeddings.weight"]
                    for rank in range(self.ranks)]
        return [self.source.chunk_state(rank, *self._last)["output_layer.weight"] for rank in range(self.ranks)]

    def logits(self, x: Tensor) -> Tensor:
        """Also of a tied head from its own copy, where the last stage has one."""
        if self.model.tie_word_embeddings and self.source.layout.pipeline > 1:
            copies = zip(self.tables(EMBEDDING), self.tables(HEAD), strict=True)
            if not all(torch.equal(embedding, head) for embedding, head in copies):
                return torch.full((x.shape[0], self.model.vocab_size), torch.nan, dtype=x.dtype)  # agrees with nothing
        return super().logits(x)

    def norm(self, layer: int | None, which: int) -> Tensor:
        if layer is None:
            return self.source.chunk_state(0, *self._last)["decoder.final_layernorm.weight"]
        return self._get(layer, 0, ("input_layernorm.weight", "pre_mlp_layernorm.weight")[which])

    def heads(self, layer: int, rank: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        bias = self._get(layer, rank, "self_attention.linear_qkv.bias") if model.add_qkv_bias else None
        packed = self.linear(x, self._get(layer, rank, "self_attention.linear_qkv.weight"), bias)
        each = model.num_attention_heads // model.num_query_groups
        groups = packed.view(x.shape[0], -1, each + 2, model.head_dim)  # a group: its queries, its key, its value
        return groups[:, :, :each].flatten(1, 2), groups[:, :, each], groups[:, :, each + 1]

    def gate_up(self, layer: int, rank: int, x: Tensor) -> Tensor:
        return self.linear(x, self._get(layer, rank, "mlp.linear_fc1.weight"))

    def back(self, layer: int, rank: int, which: str, x: Tensor) -> Tensor:
        return self.linear(x, self._get(layer, rank, {"proj": "self_attention.linear_proj.weight",
                                                      "down": "mlp.linear_fc2.weight"}[which]))


def whole_tensor(source: Source, rules: dict[str, tuple[HFTensor, Rule]], name: str) -> Tensor:
    """A whole HF tensor of any source."""
    tensor, rule = rules[name]
    dim = rule.dim or 0
    views = source.read(name, dim, 0, tensor.shape[dim])
    return views[0] if len(views) == 1 else torch.cat(views, dim=dim)


def forward_of(source: HFFolder | MegatronCheckpoint | MergedSource, model: ModelConfig,
               dtype: torch.dtype | None = None) -> Forward:
    """The passes of an opened folder, or of merged weights."""
    if isinstance(source, HFFolder):
        return HFForward(source.tensor, model, dtype)
    if isinstance(source, MergedSource):
        return HFForward(partial(whole_tensor, source, hf_rules(model)), model, dtype)
    return MegatronForward(source, model, dtype)
