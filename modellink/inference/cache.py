"""Keys and values of the tokens a batch has seen, one row a request; rows may have different lengths."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modellink.ops.attention import attention


class KVCache:
    """Pre-allocated keys and values of the layers of one model chunk, and what megatron-core asks of its context.

    A forward pass takes the same number of tokens for each of some neighbouring rows: `begin`, the model (whose
    attention calls `attend` in each layer), `advance`. Every row is attended over its own tokens only.

    Args:
        layer_numbers: global numbers of the layers that this rank holds.
        num_rows: requests that fit.
        max_sequence_length: tokens that fit in a row.
        num_groups: key/value groups of this rank.
        head_dim: size of a head.

    Attributes:
        lengths: tokens in each row.
        positions: of the tokens of this pass: [s], or [s, rows] where rows have different lengths.
        materialize_only_last_token_logits: read by megatron-core: the head runs on the last token only.
    """

    def __init__(self, layer_numbers: Sequence[int], num_rows: int, max_sequence_length: int, num_groups: int,
                 head_dim: int, *, dtype: torch.dtype, device: torch.device):
        self.max_sequence_length = max_sequence_length
        self.materialize_only_last_token_logits = True
        self.lengths = [0] * num_rows
        self.positions = torch.empty(0, dtype=torch.int64)
        # zeros: what lies behind the end of a row takes part in products with the weight 0 and must be finite
        shape = (2, num_rows, num_groups, max_sequence_length, head_dim)
        self._memory = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layer_numbers}
        self._device = device
        self._first = self._stop = self._count = 0
        self._mask: Tensor | None = None
        self._places: tuple[Any, ...] = ()

    @classmethod
    def for_model(cls, model: Any, num_rows: int, max_sequence_length: int) -> "KVCache":
        """A cache for the layers of a model chunk, on its device and in its dtype."""
        config, weight = model.config, next(model.parameters())
        return cls([layer.layer_number for layer in model.decoder.layers], num_rows, max_sequence_length,
                   config.num_query_groups // config.tensor_model_parallel_size, config.kv_channels,
                   dtype=config.params_dtype, device=weight.device)

    def is_static_batching(self) -> bool:
        """For megatron-core: the last token of every row is the last of the pass."""
        return True

    def is_dynamic_batching(self) -> bool:
        """For megatron-core: rows are not packed along one sequence."""
        return False

    def begin(self, first_row: int, num_rows: int, num_tokens: int) -> None:
        """Prepare a pass of `num_tokens` new tokens for each of `num_rows` rows from `first_row` on."""
        self._first, self._stop, self._count = first_row, first_row + num_rows, num_tokens
        lengths = self.lengths[first_row:self._stop]
        if max(lengths) + num_tokens > self.max_sequence_length:
            raise ValueError(f"{max(lengths)} + {num_tokens} tokens do not fit in {self.max_sequence_length}")
        new = torch.arange(num_tokens)
        if len(set(lengths)) == 1:
            self.positions, self._mask = lengths[0] + new, None
            return
        self.positions = torch.tensor(lengths) + new[:, None]  # [s, rows]
        seen = torch.arange(max(lengths) + num_tokens)
        self._mask = (seen <= self.positions.T[:, None, :, None]).to(self._device)  # [rows, 1, s, keys]
        rows = torch.arange(num_rows).expand_as(self.positions)
        self._places = rows.to(self._device), slice(None), self.positions.to(self._device)

    def advance(self) -> None:
        """The pass is over in every layer."""
        for row in range(self._first, self._stop):
            self.lengths[row] += self._count

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the new keys and values of a layer and attend over all of each row.

        Args:
            query: [s, rows, heads, head_dim].
            key, value: [s, rows, groups, head_dim].

        Returns:
            [s, rows, heads * head_dim].
        """
        rows = self._memory[layer_number][:, self._first:self._stop]  # [2, rows, groups, length, head_dim]
        new = torch.stack((key, value))
        if self._mask is None:
            start = self.lengths[self._first]
            rows[:, :, :, start:start + self._count] = new.permute(0, 2, 3, 1, 4)
            keys, values = rows[..., :start + self._count, :].permute(0, 3, 1, 2, 4)  # twice [t, rows, groups, d]
            return attention(query, keys, values)
        rows[0][self._places], rows[1][self._places] = key, value
        keys, values = rows[..., :self._mask.shape[-1], :]
        out = scaled_dot_product_attention(query.permute(1, 2, 0, 3), keys, values, attn_mask=self._mask,
                                           enable_gqa=query.shape[2] != key.shape[2])
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def remove(self, row: int, last: int) -> None:
        """Forget `row`; the row `last`, the last one in use, takes its place."""
        length = self.lengths[last]
        if row != last:
            for memory in self._memory.values():
                memory[:, row, :, :length] = memory[:, last, :, :length]
        self.lengths[row], self.lengths[last] = length, 0
