"""Rows of the vocabulary beyond the model's: are they padding, so that a conversion may cut them?"""

import torch
from torch import Tensor

from modellink.checkpoint.megatron import MegatronCheckpoint
from modellink.checkpoint.qwen15 import EMBEDDING, HEAD
from modellink.config.errors import ConfigError


def cut_line(source: MegatronCheckpoint, vocab_size: int, *, stated: bool) -> str:
    """One line that says which rows of the source are left out and why they are padding; empty when there are none.

    Args:
        source: the checkpoint.
        vocab_size: rows that are kept.
        stated: the checkpoint's args or the command line say that the vocabulary ends there. Otherwise the rows must
            look like padding: zeros (this program's), or copies of the last row (ModelLink's converter).

    Raises:
        ConfigError: the rows hold values of their own.
    """
    if vocab_size >= source.padded_vocab_size:
        return ""
    tables = [EMBEDDING] if source.model.tie_word_embeddings else [EMBEDDING, HEAD]
    kinds = [_kind(torch.cat(source.read(name, 0, vocab_size - 1, source.padded_vocab_size))) for name in tables]
    rows = f"vocabulary rows {vocab_size} to {source.padded_vocab_size - 1}"
    if "" not in kinds:
        return f"{rows} are padding ({' and '.join(dict.fromkeys(kinds))}) and are left out"
    if stated:
        return f"{rows} are padding by the checkpoint's own vocabulary size and are left out"
    table = tables[kinds.index("")]
    raise ConfigError(f"{source.folder}: {rows} of {table} hold values of their own, and the checkpoint does not say "
                      f"that they are padding; give --true-vocab-size {vocab_size} if they are.")


def _kind(rows: Tensor) -> str:
    """What the rows behind the first one are: `zeros`, `copies of the last row`, or nothing known."""
    last, rest = rows[:1], rows[1:]
    if not rest.any():
        return "zeros"
    return "copies of the last row" if torch.equal(rest, last.expand_as(rest)) else ""
