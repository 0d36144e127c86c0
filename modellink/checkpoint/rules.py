"""The form of a rule: one Megatron tensor, and where each of its rows or columns lives in the HF tensors.

HF coordinates are the common ground. A rule lists, for any tensor parallel size and rank, which slices of HF tensors
make up the rank's Megatron tensor, in order. Read forwards it cuts Megatron tensors out of a HF folder, read backwards
it finds the pieces of a HF tensor in rank files, and both together reshard one Megatron layout into another.
"""

from dataclasses import dataclass
from typing import NamedTuple


class HFTensor(NamedTuple):
    """A HF tensor: its name and its full shape."""

    name: str
    shape: tuple[int, ...]


class Piece(NamedTuple):
    """Indices [start, stop) of a HF tensor along the rule's dimension."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor.

    Attributes:
        megatron: its name inside a model chunk, with the local layer number filled in as `{layer}`.
        hf: the HF tensors it packs.
        dim: the dimension that tensor parallel ranks share out; None when every rank holds the whole.
        units: each HF tensor falls into this many equal units along `dim`; the Megatron tensor holds unit 0 of each
            HF tensor, then unit 1 of each, and so on, and a rank takes consecutive units. None: one unit per rank.
        padded: whether the rows are the vocabulary, padded with zero rows beyond the HF tensor's own.
    """

    megatron: str
    hf: tuple[HFTensor, ...]
    dim: int | None
    units: int | None = None
    padded: bool = False

    def pieces(self, tensor_size: int, tensor_rank: int, padded_vocab_size: int) -> list[Piece]:
        """The HF slices of one rank's tensor in order; a vocabulary slice may end beyond the HF tensor's rows."""
        if self.dim is None:
            return [Piece(tensor.name, 0, tensor.shape[0]) for tensor in self.hf]
        units = self.units or tensor_size
        mine = range(tensor_rank * units // tensor_size, (tensor_rank + 1) * units // tensor_size)
        pieces = []
        for unit in mine:
            for tensor in self.hf:
                size = (padded_vocab_size if self.padded else tensor.shape[self.dim]) // units
                pieces.append(Piece(tensor.name, unit * size, (unit + 1) * size))
        return pieces

    def local_shape(self, tensor_size: int, padded_vocab_size: int) -> tuple[int, ...]:
        """The shape of one rank's Megatron tensor."""
        shape = list(self.hf[0].shape)
        if self.dim is not None:
            pieces = self.pieces(tensor_size, 0, padded_vocab_size)
            shape[self.dim] = sum(piece.stop - piece.start for piece in pieces)
        return tuple(shape)
