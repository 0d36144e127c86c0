"""A stored (uncompressed) zip file written front to back, each entry's data aligned: the container of torch files.

Python's zipfile would do, at twice the time: it takes the data piece by piece and computes checksums in between.
Format: PKWARE's APPNOTE.TXT 6.3.x, sections 4.3.7 (local header), 4.3.12 (central), 4.3.14 to 16 (ends), 4.5.3 (zip64).
"""

import os
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from modellink.checkpoint.checksums import FileSum, combine
from modellink.checkpoint.streams import write_blocks_checked, write_views

ALIGNMENT = 64  # bytes, as torch aligns its records
SEE_ZIP64 = 0xFFFFFFFF  # in a 32-bit field: the value is in the zip64 field
WIDE_FROM = SEE_ZIP64  # sizes and offsets from here on go to the zip64 field
VERSION = 45  # the version that knows zip64
DATE = 0x21  # 1 January 1980, the earliest; equal inputs give equal files


def _short(value: int) -> int:
    return SEE_ZIP64 if value >= WIDE_FROM else value


@dataclass
class _Entry:
    name: bytes
    offset: int
    size: int
    crc: int


class StoredZip:
    """Writes entries `prefix/name`; leave the `with` block to write the directory.

    Attributes:
        sum: size and CRC-32 of the whole file, once the directory is written.
    """

    sum = FileSum(0, 0)

    def __init__(self, path: Path, prefix: str = "archive"):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._prefix = prefix
        self._entries: list[_Entry] = []
        self._pool = ThreadPoolExecutor(1)  # sleeps unless a large entry is written

    def __enter__(self) -> "StoredZip":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write_directory()
        finally:
            self._pool.shutdown()
            self._file.close()

    def add(self, name: str, size: int, blocks: Iterable[Tensor] | bytes) -> None:
        """Write one entry of `size` bytes."""
        entry = _Entry(f"{self._prefix}/{name}".encode(), self._file.tell(), size, 0)
        header = self._local_header(entry)
        self._write(header)
        if isinstance(blocks, bytes):
            entry.crc = zlib.crc32(blocks)
            written = self._write(blocks)
        else:
            written, entry.crc = write_blocks_checked(self._file.fileno(), blocks, self._pool)
        if written != size:
            raise RuntimeError(f"{self._file.name}: {name} has {written} bytes instead of {size}")
        header = self._local_header(entry)  # now with the checksum
        os.pwrite(self._file.fileno(), header, entry.offset)
        self._count(header)
        self.sum = FileSum(self.sum.size + size, combine(self.sum.crc32, entry.crc, size))
        self._entries.append(entry)

    def _write(self, content: bytes) -> int:
        return write_views(self._file.fileno(), [memoryview(content)])

    def _local_header(self, entry: _Entry) -> bytes:
        extra = struct.pack("<HHQQ", 1, 16, entry.size, entry.size) if entry.size >= WIDE_FROM else b""
        padding = -(entry.offset + 30 + len(entry.name) + len(extra) + 4) % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        short = _short(entry.size)
        return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", VERSION, 0, 0, 0, DATE, entry.crc, short, short,
                           len(entry.name), len(extra)) + entry.name + extra

    def _write_directory(self) -> None:
        start = self._file.tell()
        content = b"".join(self._central_header(entry) for entry in self._entries)
        count, size = len(self._entries), len(content)
        if start >= WIDE_FROM or count >= 0xFFFF:
            content += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, VERSION, VERSION, 0, 0, count, count, size, start)
            content += struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
        content += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), size,
                               _short(start), 0)
        self._write(content)
        self._count(content)

    def _count(self, content: bytes) -> None:
        self.sum = FileSum(self.sum.size + len(content), zlib.crc32(content, self.sum.crc32))

    def _central_header(self, entry: _Entry) -> bytes:
        wide = [value for value in (entry.size, entry.size, entry.offset) if value >= WIDE_FROM]
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        short = _short(entry.size)
        return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", VERSION, VERSION, 0, 0, 0, DATE, entry.crc, short, short,
                           len(entry.name), len(extra), 0, 0, 0, 0, _short(entry.offset)) + entry.name + extra
