"""Turns the samples of a microbatch into tensors: equal lengths, padding, or packing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
NAMES = ("tokens", "labels", "loss_mask")
PAD = 0  # any id of the vocabulary: padding is masked out of the loss, and causal attention never looks ahead


def stack(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples of equal length: [batch, sequence] each."""
    return {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in NAMES}


def pad(samples: Sequence[dict[str, Any]], length: int) -> Batch:
    """Samples of unequal length, padded or cut on the right to `length`: [batch, length] each."""
    out = {"tokens": torch.full((len(samples), length), PAD, dtype=torch.int64),
           "labels": torch.full((len(samples), length), PAD, dtype=torch.int64),
           "loss_mask": torch.zeros(len(samples), length)}
    for row, sample in enumerate(samples):
        for name in NAMES:
            values = torch.as_tensor(sample[name])[:length]
            out[name][row, :len(values)] = values
    out["labels"].clamp_(min=PAD)  # -100 marks what is not learnt; the mask says so already
    return out


def pack(rows: Sequence[Sequence[dict[str, Any]]], length: int) -> Batch:
    """Rows of several samples each, one after another in one long row of batch 1: [1, rows x length].

    `cu_seqlens` (int32, on the CPU) holds the boundaries: of every sample, and of the padding behind the last one
    of each row, so that no token of one sample sees another.
    """
    parts: list[dict[str, Any]] = []
    lengths: list[int] = []
    for samples in rows:
        parts += samples
        own = [len(sample["tokens"]) for sample in samples]
        if sum(own) > length:
            raise ValueError(f"samples of {sum(own)} tokens do not fit into a row of {length}")
        lengths += own
        if sum(own) < length:
            padding = length - sum(own)
            lengths.append(padding)
            parts.append({"tokens": torch.full((padding,), PAD), "labels": torch.full((padding,), PAD),
                          "loss_mask": torch.zeros(padding)})
    batch = {name: torch.cat([torch.as_tensor(part[name]) for part in parts])[None] for name in NAMES}
    batch["labels"].clamp_(min=PAD)
    batch["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return batch
