"""Keys and values of the tokens that rows have seen; rows may have different lengths."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modellink.device.copies import queued_copy
from modellink.ops.attention import RowLengths, attend_rows, lower_right


@dataclass(frozen=True)
class Piece:
    """New tokens of one row in a pass.

    Attributes:
        row: of the cache.
        start: tokens of the row that they stand behind; the row forgets what lies there.
        tokens: the new tokens.
        is_kept: the row has them from then on; otherwise it ends at `start` again after the pass.
        offsets: place of each token behind `start` (default: one behind the other).
        mask: [tokens, tokens] bool, which of the new tokens each of them sees (default: those up to itself). All see
            the tokens before `start`.
    """

    row: int
    start: int
    tokens: Sequence[int]
    is_kept: bool = True
    offsets: Sequence[int] | None = None
    mask: Tensor | None = None


class KVCache:
    """Pre-allocated keys and values of the layers of one pipeline stage.

    A pass: `begin` with the pieces whose tokens are packed one piece behind the other, `place`, `attend` in each layer,
    `end`.

    Args:
        layer_numbers: the layers that this rank holds.
        num_rows: rows.
        length: tokens that fit in a row.
        num_groups: key/value groups of this rank.
        head_dim: size of a head.
        dtype: of keys and values.
        is_int8: store them as int8 with one scale for each token and head; attention reads them as `dtype`.

    Attributes:
        tokens: what each row holds. A row that nobody uses any more keeps its tokens: a later prompt may begin so.
        positions: of the packed tokens of this pass, [n] int64; known between `place` and `end`.
    """

    def __init__(self, layer_numbers: Sequence[int], num_rows: int, length: int, num_groups: int, head_dim: int, *,
                 dtype: torch.dtype, device: torch.device, is_int8: bool = False):
        self.num_rows, self.length, self.is_int8 = num_rows, length, is_int8
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.positions = torch.empty(0, dtype=torch.int64)
        self._device, self._dtype = device, dtype
        # zeros: what lies behind the end of a row takes part in products with the weight 0 and must be finite
        shape = (2, num_rows, num_groups, length, head_dim)
        self._memory = {layer: torch.zeros(shape, dtype=torch.int8 if is_int8 else dtype, device=device)
                        for layer in layer_numbers}
        self._scales = {layer: torch.zeros(shape[:-1], dtype=torch.float32, device=device)
                        for layer in layer_numbers} if is_int8 else {}
        self._pieces: Sequence[Piece] = ()
        self._masks: list[Tensor | None] = []
        # of each call, None where its mask says more than they do
        self._lengths: list[RowLengths | None] = []
        self._is_step = False
        self._places: tuple[Tensor, Tensor] = (self.positions, self.positions)
        self._longest = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and scales on this rank."""
        return sum(part.numel() * part.element_size() for parts in (self._memory, self._scales)
                   for part in parts.values())

    def begin(self, pieces: Sequence[Piece]) -> None:
        """Prepare a pass of these pieces.

        Raises:
            ValueError: a piece does not fit.
        """
        longest = max(piece.start + len(piece.tokens) for piece in pieces)
        if longest > self.length:
            raise ValueError(f"{longest} tokens do not fit in {self.length}")
        self._pieces, self._longest = pieces, longest
        for piece in pieces:  # at once: a pass that fails must not leave tokens whose keys are overwritten
            del self.tokens[piece.row][piece.start:]
        # one token for each of the first rows: a step of generation
        self._is_step = all(piece.row == row and len(piece.tokens) == 1 for row, piece in enumerate(pieces))

    def place(self) -> None:
        """Bring to the device where the tokens of this pass stand and what each of them sees."""
        if self._is_step:
            self.place_step(queued_copy(torch.tensor(self.starts), self._device), self._longest,
                            [start + 1 for start in self.starts])
            return
        places = [piece.start + offset for piece in self._pieces
                  for offset in piece.offsets or range(len(piece.tokens))]
        ends = [piece.start + len(piece.tokens) for piece in self._pieces]
        both = queued_copy(torch.tensor([*places, *ends]), self._device)
        self.positions, lengths = both[:len(places)], both[len(places):].int()
        self._masks = [self._mask(piece) for piece in self._pieces]
        self._lengths = [RowLengths(lengths[i:i + 1], end, [end]) if piece.mask is None else None
                         for i, (piece, end) in enumerate(zip(self._pieces, ends))]

    @property
    def longest(self) -> int:
        """Tokens of the longest row of this pass, the new ones included."""
        return self._longest

    @property
    def starts(self) -> list[int]:
        """Tokens of each row of this pass before its new ones."""
        return [piece.start for piece in self._pieces]

    @property
    def is_step(self) -> bool:
        """Whether this pass has one token of each of the first rows."""
        return self._is_step

    def place_step(self, positions: Tensor, end: int, lengths: Sequence[int] | None = None) -> None:
        """`place` for a step, made of the positions by work of the device alone.

        Args:
            positions: of the tokens, [n] int64 on the device. While the rows grow only its values change, no shape.
            end: tokens of a row that are read; those behind a position are masked.
            lengths: tokens of each row, the new one included, where the host knows them.
        """
        self.positions, self._longest = positions, end
        self._places = torch.arange(len(positions), device=self._device), positions
        if lengths is not None and min(lengths) == end:
            self._masks = [None]
        else:
            self._masks = [(torch.arange(end, device=self._device) <= positions[:, None])[:, None, None]]
        self._lengths = [RowLengths((positions + 1).int(), end, lengths)]

    def _mask(self, piece: Piece) -> Tensor | None:
        count = len(piece.tokens)
        if piece.mask is None:
            return lower_right(count, piece.start + count, self._device)
        before = torch.ones(count, piece.start, dtype=torch.bool)
        return queued_copy(torch.cat((before, piece.mask), dim=1), self._device)

    def end(self) -> None:
        """The pass is over in every layer; nothing of it stays on the device but keys and values."""
        self.positions = torch.empty(0, dtype=torch.int64)
        self._places, self._masks = (self.positions, self.positions), []
        for piece in self._pieces:
            if piece.is_kept:
                self.tokens[piece.row].extend(piece.tokens)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the new keys and values of a layer and attend over all that each token sees.

        Args:
            query: [n, heads, head_dim], the packed tokens.
            key, value: [n, groups, head_dim].

        Returns:
            [n, heads * head_dim].
        """
        if self._is_step:
            rows, places = self._places
            self._write(layer, 0, (rows, slice(None), places), key)
            self._write(layer, 1, (rows, slice(None), places), value)
            count = query.shape[0]
            lengths = self._lengths[0]
            keys, values = (self._read(layer, which, slice(count), self._longest, lengths is not None)
                            for which in (0, 1))
            out = attend_rows(query[:, :, None], keys, values, self._masks[0], lengths=lengths)
            return out.reshape(count, -1)
        parts, first = [], 0
        for piece, mask, lengths in zip(self._pieces, self._masks, self._lengths, strict=True):
            last = first + len(piece.tokens)
            end = piece.start + len(piece.tokens)
            for which, new in enumerate((key, value)):
                self._write(layer, which, (piece.row, slice(None), slice(piece.start, end)),
                            new[first:last].transpose(0, 1))
            row = slice(piece.row, piece.row + 1)
            keys, values = (self._read(layer, which, row, end, lengths is not None) for which in (0, 1))
            out = attend_rows(query[first:last].transpose(0, 1)[None], keys, values, mask, lengths=lengths)
            parts.append(out[0].transpose(0, 1).reshape(last - first, -1))
            first = last
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _write(self, layer: int, which: int, place: tuple, new: Tensor) -> None:
        if not self.is_int8:
            self._memory[layer][which][place] = new
            return
        scales = new.float().abs().amax(-1, keepdim=True) / 127
        # a token of zeros has the scale 0, and its quotient is no number
        self._memory[layer][which][place] = (new / scales).nan_to_num_(0.0).round_().to(torch.int8)
        self._scales[layer][which][place] = scales[..., 0]

    def _read(self, layer: int, which: int, rows: slice, end: int, is_whole: bool = False) -> Tensor:
        """Keys or values; `is_whole`: what lies behind `end` may come along, so that they need not be cut out."""
        whole = self._memory[layer][which][rows]
        if not self.is_int8:
            return whole if is_whole else whole[:, :, :end]
        return (whole[:, :, :end] * self._scales[layer][which][rows, :, :end, None]).to(self._dtype)

    def copy(self, source: int, target: int, count: int) -> None:
        """`target` holds the first `count` tokens of `source` and nothing else."""
        if source != target:
            for parts in (self._memory, self._scales):
                for part in parts.values():
                    part[:, target, :, :count] = part[:, source, :, :count]
        self.tokens[target] = self.tokens[source][:count]

    def arrange(self, sources: Sequence[int], start: int = 0) -> None:
        """Row i takes what row sources[i] holds, for all at once; the rows involved share their first `start` tokens.
        """
        moved = [row for row, source in enumerate(sources) if row != source]
        if not moved:
            return
        end = max(len(self.tokens[sources[row]]) for row in moved)
        targets, origins = (queued_copy(torch.tensor(rows), self._device)
                            for rows in (moved, [sources[row] for row in moved]))
        for parts in (self._memory, self._scales):
            for part in parts.values():
                part[:, targets, :, start:end] = part[:, origins, :, start:end]
        held = [list(self.tokens[source]) for source in sources]
        self.tokens[:len(sources)] = held

    def take_rows(self, other: "KVCache") -> None:
        """Copy the rows of a cache of other measures as far as they fit."""
        for row in range(min(self.num_rows, other.num_rows)):
            count = min(len(other.tokens[row]), self.length)
            for mine, theirs in ((self._memory, other._memory), (self._scales, other._scales)):
                for layer, part in mine.items():
                    part[:, row, :, :count] = theirs[layer][:, row, :, :count]
            self.tokens[row] = other.tokens[row][:count]

    def best_donor(self, prompt: Sequence[int], without: Sequence[int] = ()) -> tuple[int, int]:
        """(row, number of tokens) of the row that shares the longest beginning with a prompt."""
        best = (0, 0)
        for row, held in enumerate(self.tokens):
            if row not in without:
                shared = shared_length(held, prompt)
                if shared > best[1]:
                    best = (row, shared)
        return best


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their beginning on."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # slices are compared in C
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
