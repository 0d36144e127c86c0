"""Writes the bytes of tensors to a file, many pieces with one system call, without copying them."""

import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor

import torch
from torch import Tensor

BATCH_BYTES = 16 << 20  # pieces that are held and written together; bounds the memory of casts and joins
BATCH_PIECES = 512  # below the 1024 that one writev takes


def byte_view(block: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return block.reshape(-1).view(torch.uint8).numpy().data


def batches(blocks: Iterable[Tensor]) -> Iterator[list[memoryview]]:
    """Group byte views; a piece larger than BATCH_BYTES is a group of its own."""
    group: list[memoryview] = []
    size = 0
    for block in blocks:
        group.append(byte_view(block))
        size += group[-1].nbytes
        if size >= BATCH_BYTES or len(group) == BATCH_PIECES:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_views(descriptor: int, views: list[memoryview]) -> int:
    """Write all views at the file's position; returns the bytes. The system may take them in several bites."""
    pending = [view for view in views if view.nbytes]
    total = sum(view.nbytes for view in pending)
    while pending:
        taken = os.writev(descriptor, pending)
        while pending and taken >= pending[0].nbytes:
            taken -= pending.pop(0).nbytes
        if taken:
            pending[0] = pending[0][taken:]
    return total


def write_blocks_checked(descriptor: int, blocks: Iterable[Tensor], pool: Executor, crc: int = 0) -> tuple[int, int]:
    """Write tensors one after another; the CRC-32 of the bytes is computed in `pool` while the system writes.

    Returns:
        Bytes written, and the checksum continued from `crc`.
    """
    size = 0
    for views in batches(blocks):
        checksum = pool.submit(_crc, views, crc)
        try:
            size += write_views(descriptor, views)
        finally:
            crc = checksum.result()
    return size, crc


def _crc(views: list[memoryview], crc: int) -> int:
    for view in views:
        crc = zlib.crc32(view, crc)
    return crc
