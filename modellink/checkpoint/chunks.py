"""Cuts one model chunk of any layout out of any opened source, tensor by tensor."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from modellink.checkpoint.layout import Layout
from modellink.checkpoint.qwen15 import chunk_rules
from modellink.checkpoint.rules import Piece, Rule
from modellink.config.model import ModelConfig


class Source(Protocol):
    """Weights that can be read in HF coordinates: an opened HF folder or Megatron checkpoint."""

    model: ModelConfig
    dtype: torch.dtype

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which the HF tensor `name` is stored."""

    def read(self, name: str, dim: int, start: int, stop: int) -> list[Tensor]:
        """Indices [start, stop) of a HF tensor along `dim`: memory-mapped views that follow one another along `dim`."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are fetched when they are written, so that only a few are in memory at once.

    Attributes:
        parts: yields tensors that follow one another along `dim`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    parts: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """The whole tensor, contiguous; it may be a memory-mapped view of its file."""
        parts = [part.to(self.dtype) for part in self.parts()]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)
        return whole.contiguous()

    def blocks(self) -> Iterator[Tensor]:
        """Contiguous tensors whose bytes, one after another, are the tensor's bytes."""
        if self.dim != 0:
            yield self.tensor()
            return
        for part in self.parts():
            yield part.to(self.dtype).contiguous()


def chunk_tensors(source: Source, layout: Layout, tensor_rank: int, stage: int, chunk: int, *, model: ModelConfig,
                  padded_vocab_size: int, dtype: torch.dtype | None = None) -> list[LazyTensor]:
    """The tensors of one model chunk, under Megatron's names with local layer numbers.

    Args:
        source: where the values come from.
        layout: the layout to cut for.
        model: the architecture; its vocab_size rows are taken, the rest up to `padded_vocab_size` are zeros.
        padded_vocab_size: vocabulary rows over all tensor ranks, a multiple of `layout.tensor`.
        dtype: cast to this dtype; None keeps each tensor's own.
    """
    return rule_tensors(source, chunk_rules(model, layout, stage, chunk), layout, tensor_rank, padded_vocab_size, dtype)


def rule_tensors(source: Source, rules: list[tuple[str, Rule]], layout: Layout, tensor_rank: int,
                 padded_vocab_size: int, dtype: torch.dtype | None = None) -> list[LazyTensor]:
    """The tensors of `rules` (full Megatron name and rule) on one tensor rank; see `chunk_tensors`."""
    tensors = []
    for name, rule in rules:
        pieces = rule.pieces(layout.tensor, tensor_rank, padded_vocab_size)
        stored = source.dtype_of(rule.hf[0].name)
        for tensor in rule.hf[1:]:
            stored = torch.promote_types(stored, source.dtype_of(tensor.name))
        tensors.append(LazyTensor(name, rule.local_shape(layout.tensor, padded_vocab_size), dtype or stored,
                                  rule.dim or 0, partial(_parts, source, rule, pieces)))
    return tensors


def _parts(source: Source, rule: Rule, pieces: list[Piece]) -> Iterator[Tensor]:
    dim = rule.dim or 0
    real = {tensor.name: tensor.shape[dim] for tensor in rule.hf}
    for piece in pieces:
        stop = min(piece.stop, real[piece.name])
        if piece.start < stop:
            yield from source.read(piece.name, dim, piece.start, stop)
        padding = piece.stop - max(stop, piece.start)
        if padding > 0:
            yield torch.zeros(padding, *rule.hf[0].shape[1:], dtype=source.dtype_of(piece.name))


def read_chunk(source: Source, layout: Layout, tensor_rank: int, stage: int, chunk: int, *, model: ModelConfig,
               padded_vocab_size: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict of one model chunk of `layout`, cut from a source of any layout.

    Tensors that need no packing are memory-mapped views of the source's files: copy them before writing into them.
    See `chunk_tensors` for the arguments.
    """
    lazy = chunk_tensors(source, layout, tensor_rank, stage, chunk, model=model, padded_vocab_size=padded_vocab_size,
                         dtype=dtype)
    return {tensor.name: tensor.tensor() for tensor in lazy}
