"""Rows for words that the loaded weights do not know (`--grow-vocab`)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def fill_new_rows(chunks: Sequence[torch.nn.Module], known: int, words: int) -> None:
    """Set rows known to words - 1 of every vocabulary table to the mean of the rows before them.

    A word that starts at the mean is as likely as an average word; zeros would make the head favour it over all words
    with negative logits. The mean is over all tensor parallel ranks, so that every layout starts alike.

    Args:
        chunks: the model chunks of this rank.
        known: rows that came from the weights.
        words: rows that are words now; later ones are padding and stay zero.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for name, table in chunk.named_parameters():
            if name not in TABLES:
                continue
            first = rank * table.shape[0]
            old = min(max(known - first, 0), table.shape[0])
            new = min(max(words - first, 0), table.shape[0])
            total = table[:old].float().sum(0)
            dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
            table[old:new] = (total / known).to(table.dtype)
