"""Tensor parallel linear layers that can carry LoRA adapters.

A follows the sharding of the layer's input and B that of its output; what crosses ranks is only as wide as the rank.
Import this module only after the device was chosen: it imports megatron.core.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from modellink.lora.plan import LoraPlan


@dataclass(frozen=True)
class OutputBlocks:
    """How the output features of one rank are packed: `units` times one block of every projection.

    Attributes:
        widths: features of one block of each HF projection, in order.
    """

    units: int
    widths: dict[str, int]

    @property
    def features(self) -> int:
        return self.units * sum(self.widths.values())

    def features_of(self, part: str) -> int:
        """Output features of an adapter; "" is the whole layer."""
        return self.units * self.widths[part] if part else self.features

    def join(self, parts: dict[str, Tensor], fill: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Pack the last dimension of each projection's tensor as the layer's output is packed.

        Args:
            parts: tensors by projection, or one under "" that is already whole.
            fill: makes the blocks of projections that have none, from their shape.
        """
        if "" in parts:
            return parts[""]
        lead = next(iter(parts.values())).shape[:-1]
        blocks = [parts[name].unflatten(-1, (self.units, width)) if name in parts
                  else fill((*lead, self.units, width)) for name, width in self.widths.items()]
        return torch.cat(blocks, dim=-1).flatten(-2)

    def rows(self, weight: Tensor, part: str) -> Tensor:
        """The rows of a fused [features, in] weight that belong to an adapter."""
        if not part:
            return weight
        start = 0
        for name, width in self.widths.items():
            if name == part:
                return weight.unflatten(0, (self.units, -1)).narrow(1, start, width).flatten(0, 1)
            start += width
        raise KeyError(part)


class AdapterWeight(torch.nn.Module):
    """One parameter of an adapter.

    It is read by calling the module: the core waits for gathered parameters (`--overlap-param-gather`) in a hook
    on the module that owns them.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor, *, shard_dim: int | None, sums_over_sequence: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        if shard_dim is not None:
            # without the mark the gradient norm would count it on one tensor parallel rank only
            set_tensor_model_parallel_attributes(self.weight, True, shard_dim, 1)
        # it saw a part of the tokens: the core sums its gradient over the tensor parallel ranks
        self.weight.sequence_parallel = sums_over_sequence  # type: ignore[attr-defined]

    def forward(self) -> Tensor:
        return self.weight


class AdaptedLinear(torch.nn.Module):
    """What column and row parallel layers with adapters share; a mixin in front of the core's class."""

    shards_input: ClassVar[bool]
    _plan: LoraPlan | None = None  # no adapter until `attach`

    def attach(self: Any, plan: LoraPlan, parts: tuple[str, ...], blocks: OutputBlocks) -> None:
        """Give the layer its adapters, all zero.

        Args:
            plan: what is trained.
            parts: the projections that get an adapter, or ("",) for one over the whole layer.
            blocks: how the layer's output is packed on this rank.
        """
        self._plan, self._blocks = plan, blocks
        self._owners: list[tuple[str, Any]] = []
        like, row, sequence = self.weight, self.shards_input, self.sequence_parallel
        for part in parts:
            owner = self
            if part:
                owner = torch.nn.Module()
                self.add_module(part, owner)
            owner.lora_A = AdapterWeight((plan.rank, like.shape[1]), like, shard_dim=1 if row else None,
                                         sums_over_sequence=sequence and not row)
            owner.lora_B = AdapterWeight((blocks.features_of(part), plan.rank), like, shard_dim=None if row else 0,
                                         sums_over_sequence=sequence and row)
            if plan.use_dora:
                owner.lora_magnitude = AdapterWeight((blocks.features_of(part),), like, shard_dim=None if row else 0,
                                                     sums_over_sequence=sequence and row)
            # not a registered child: the owner may be the layer itself
            self._owners.append((part, owner))

    @torch.no_grad()
    def initialise_magnitude(self: Any) -> None:
        """DoRA starts from the lengths of the rows of weight + scale x B A."""
        for part, owner in self._owners:
            owner.lora_magnitude.weight.copy_(self._row_norm(part, owner))

    def _dropped(self: Any, x: Tensor) -> Tensor:
        if not self.training or not self._plan.dropout:
            return x
        # Ranks that hold different features draw different masks. Under sequence parallelism the core has already
        # switched to the ranks' own random state.
        own = self.shards_input and not self.sequence_parallel and self.tp_group.size() > 1
        with get_cuda_rng_tracker().fork() if own else nullcontext():
            return torch.nn.functional.dropout(x, self._plan.dropout)

    def _down(self: Any, x: Tensor) -> Tensor:
        """[s, b, in] -> [s, b, adapters x rank]."""
        weights = [owner.lora_A() for _, owner in self._owners]
        if len(weights) > 1 and not (self.training and self._plan.dropout):
            return torch.nn.functional.linear(x, torch.cat(weights))
        products = [torch.nn.functional.linear(self._dropped(x), weight) for weight in weights]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def _adapt(self: Any, output: Tensor, hidden: Tensor) -> Tensor:
        """Add the adapters to the layer's output.

        Args:
            output: [s, b, features], the layer's own.
            hidden: [s, b, adapters x rank], whole on every rank that holds these features and tokens.
        """
        plan = self._plan
        pieces = hidden.split(plan.rank, dim=-1)
        deltas = {part: torch.nn.functional.linear(piece, owner.lora_B())
                  for (part, owner), piece in zip(self._owners, pieces)}
        delta = self._blocks.join(deltas, output.new_zeros)
        if not plan.use_dora:
            return torch.add(output, delta, alpha=plan.scaling)
        scales = {part: owner.lora_magnitude().float() / self._row_norm(part, owner) for part, owner in self._owners}
        scale = self._blocks.join(scales, lambda shape: torch.ones(shape, device=output.device)).to(output.dtype)
        if self.bias is None:
            return scale * torch.add(output, delta, alpha=plan.scaling)
        return scale * torch.add(output - self.bias, delta, alpha=plan.scaling) + self.bias

    @torch.no_grad()
    def _row_norm(self: Any, part: str, owner: Any) -> Tensor:
        """Lengths of the rows of weight + scale x B A, [features] fp32; DoRA takes them as constants.

        The sum is not formed: |w + sbA|^2 = |w|^2 + 2s b.(Aw) + s^2 b(AA^T)b, each of which adds up over the ranks
        that share the input features.
        """
        weight, a, b = self._blocks.rows(self.weight, part), owner.lora_A().float(), owner.lora_B().float()
        scale = self._plan.scaling
        cross = torch.nn.functional.linear(weight, a.to(weight.dtype)).float()
        square = (torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
                  + 2 * scale * (b * cross).sum(1) + scale**2 * ((b @ (a @ a.T)) * b).sum(1))
        if self.shards_input and self.tp_group.size() > 1:
            dist.all_reduce(square, group=self.tp_group)
        return square.clamp_min(0).sqrt()


class LoraColumnParallelLinear(AdaptedLinear, ColumnParallelLinear):
    """A replicated, B sharded with the output."""

    shards_input = False

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """[s (/ TP under sequence parallelism), b, in] -> ([s, b, out / TP], bias or None)."""
        output, bias = super().forward(input_, *args, **options)
        if self._plan is None:
            return output, bias
        hidden = self._down(input_)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            # after A, so that the gradient of A is whole on every rank
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self._adapt(output, hidden), bias


class LoraRowParallelLinear(AdaptedLinear, RowParallelLinear):
    """A sharded with the input, B replicated."""

    shards_input = True

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in / TP] -> ([s (/ TP under sequence parallelism), b, out], bias or None)."""
        output, bias = super().forward(input_)
        if self._plan is None:
            return output, bias
        hidden = self._down(input_)
        if self.sequence_parallel:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self._adapt(output, hidden), bias
