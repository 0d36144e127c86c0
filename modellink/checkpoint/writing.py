"""Writes a whole Megatron checkpoint, one tensor at a time, in any layout from any source."""

import argparse
import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from modellink.checkpoint.chunks import LazyTensor, Source, chunk_tensors
from modellink.checkpoint.folders import RANK_FILE, rank_folder_name
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.rank_file import write_rank_file
from modellink.config.model import ModelConfig

CHECKPOINT_VERSION = 3.0  # Megatron-LM's: the packing of query, key and value by groups


def rank_states(source: Source, layout: Layout, stage: int, *, model: ModelConfig, padded_vocab_size: int,
                dtype: torch.dtype | None) -> list[dict[str, dict[str, LazyTensor]]]:
    """For each tensor rank of one pipeline stage its model chunks, under the keys `model` or `model0`, `model1` ..."""
    def chunks_of(tensor_rank: int) -> dict[str, dict[str, LazyTensor]]:
        chunks = {}
        for chunk in range(layout.chunks):
            tensors = chunk_tensors(source, layout, tensor_rank, stage, chunk, model=model,
                                    padded_vocab_size=padded_vocab_size, dtype=dtype)
            chunks[f"model{chunk}" if layout.chunks > 1 else "model"] = {tensor.name: tensor for tensor in tensors}
        return chunks

    return [chunks_of(tensor_rank) for tensor_rank in range(layout.tensor)]


def total_bytes(source: Source, layout: Layout, *, model: ModelConfig, padded_vocab_size: int,
                dtype: torch.dtype | None) -> int:
    """Bytes of all tensors of a checkpoint."""
    return sum(tensor.nbytes for stage in range(layout.pipeline)
               for state in rank_states(source, layout, stage, model=model, padded_vocab_size=padded_vocab_size,
                                        dtype=dtype)
               for chunk in state.values() for tensor in chunk.values())


def write_checkpoint(folder: Path, source: Source, layout: Layout, *, model: ModelConfig, padded_vocab_size: int,
                     dtype: torch.dtype | None, args: argparse.Namespace, iteration: int) -> Iterator[int]:
    """Write every rank file into the iteration folder `folder`; yields the bytes written as it goes.

    The rank files of a stage advance together, so that each tensor of the source is read from disk once.
    """
    common: dict[str, Any] = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration,
                              "num_floating_point_operations_so_far": 0}
    for stage in range(layout.pipeline):
        states = rank_states(source, layout, stage, model=model, padded_vocab_size=padded_vocab_size, dtype=dtype)
        files: list[Generator[int, None, None]] = []
        for tensor_rank, chunks in enumerate(states):
            path = folder / rank_folder_name(layout, tensor_rank, stage) / RANK_FILE
            path.parent.mkdir(parents=True)
            files.append(write_rank_file(path, {**common, **chunks}))
        try:
            for sizes in zip(*files, strict=True):
                yield sum(sizes)
        finally:
            for file in files:
                with contextlib.suppress(OSError):  # on a full disk every file fails to close
                    file.close()
