"""Megatron's indexed token files: PREFIX.bin holds the tokens, PREFIX.idx the length and place of each document.

Layout of .idx (little endian): magic `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 number of sequences n,
u64 number of document marks d, int32[n] lengths, int64[n] byte offsets into .bin, int64[d] document marks
(sequence index at which each document starts, and n at the end). .bin is the tokens and nothing else.
"""

import contextlib
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from modellink.config.errors import ConfigError
from modellink.config.files import placeholder_kind, write_beside
from modellink.data.prefix import missing_prefix_hint

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.number[Any]]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
BLOCK = 1 << 20  # sequences handled at once, to keep temporary arrays small


def data_files(prefix: str | Path) -> tuple[Path, Path]:
    """(.bin, .idx) of a prefix; a prefix that ends in .bin or .idx already is taken as meant."""
    text = str(prefix)
    if text.endswith((".bin", ".idx")):
        text = text[:-4]
    return Path(text + ".bin"), Path(text + ".idx")


class IndexedWriter:
    """Write documents to PREFIX.bin and PREFIX.idx; both appear when the `with` block ends well, neither otherwise.

    Args:
        prefix: path without suffix.
        dtype: token type. int32 whatever the vocabulary: uint16, which Megatron picks for small ones,
            cannot hold the -100 of masked labels.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.number[Any]] = np.int32):
        self.bin_path, self.idx_path = data_files(prefix)
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.tokens = 0
        self._lengths: list[np.ndarray] = []
        self._files = contextlib.ExitStack()

    def __enter__(self) -> "IndexedWriter":
        with contextlib.ExitStack() as files:
            # unwound in reverse: .bin is renamed first, so a new .idx never points at tokens that are not there
            self._idx_beside = files.enter_context(write_beside(self.idx_path))
            self._bin = files.enter_context(open(files.enter_context(write_beside(self.bin_path)), "wb", 1 << 20))
            self._files = files.pop_all()
        return self

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents in bulk.

        Args:
            tokens: [sum(lengths)], the documents' tokens one after the other.
            lengths: int32 [documents], tokens in each.
        """
        if int(lengths.sum(dtype=np.int64)) != tokens.size:
            raise ValueError(f"lengths add up to {lengths.sum()}, but there are {tokens.size} tokens")
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(lengths.astype(np.int32))
        self.documents += len(lengths)
        self.tokens += tokens.size

    def _write_index(self) -> None:
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        count = len(lengths)
        with open(self._idx_beside, "wb", buffering=1 << 20) as index:
            index.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], count, count + 1))
            index.write(lengths.data)
            offset = 0
            for start in range(0, count, BLOCK):
                ends = np.cumsum(lengths[start:start + BLOCK], dtype=np.int64) * self.dtype.itemsize
                index.write((offset + np.concatenate(([0], ends[:-1]))).astype(np.int64).data)
                offset += int(ends[-1])
            for start in range(0, count + 1, BLOCK):
                index.write(np.arange(start, min(start + BLOCK, count + 1), dtype=np.int64).data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            self._bin.flush()
            self._write_index()


class IndexedDataset:
    """Memory-mapped reader of PREFIX.bin and PREFIX.idx.

    Attributes:
        sizes: int32 [n], tokens in each sequence.
        document_indices: int64 [d], Megatron's document marks.
        dtype: type of the stored tokens.

    Raises:
        ConfigError: a file is missing, cut, or not what Megatron's readers accept.
    """

    def __init__(self, prefix: str | Path):
        self.bin_path, self.idx_path = data_files(prefix)
        self.prefix = str(self.bin_path)[:-len(".bin")]
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise ConfigError(f"{self.prefix}: no such data set, {path.name} is missing"
                                  f"{missing_prefix_hint(self.prefix)}.")
        self._read_index()
        self._check_bin()
        # numpy refuses to map an empty file
        self._tokens = np.memmap(self.bin_path, mode="r", dtype=np.uint8) if self._bytes else np.zeros(0, np.uint8)

    def _corrupt(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.idx_path}: not a valid index, {reason}; "
                           "run tools/preprocess_data.py again or copy the pair of files again.")

    def _read_index(self) -> None:
        kind = placeholder_kind(self.idx_path)
        if kind:
            raise ConfigError(f"{self.idx_path}: this is {kind}; fetch the real file.")
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as handle:
            head = handle.read(HEADER.size)
        if len(head) < HEADER.size:
            raise self._corrupt(f"it has {len(head)} bytes and its header alone needs {HEADER.size}")
        magic, version, code, count, marks = HEADER.unpack(head)
        if magic != MAGIC:
            raise self._corrupt(f"it starts with {magic!r} and must start with {MAGIC!r}")
        if version != VERSION:
            raise self._corrupt(f"its version is {version} and must be {VERSION}")
        if code not in DTYPES:
            raise self._corrupt(f"its dtype code is {code} and must be one of 1 to {max(DTYPES)}")
        self.dtype = np.dtype(DTYPES[code])
        if self.dtype.kind == "f":
            raise self._corrupt(f"its dtype is {self.dtype} and token ids are integers")
        expected = HEADER.size + count * 12 + marks * 8
        if size not in (expected, expected + count):  # + one mode byte a sequence, in multimodal files
            raise self._corrupt(f"{count} sequences and {marks} marks need {expected} bytes, it has {size}")
        index = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        at = HEADER.size
        self.sizes = np.frombuffer(index, np.int32, count, at)
        self._offsets = np.frombuffer(index, np.int64, count, at + count * 4)
        self.document_indices = np.frombuffer(index, np.int64, marks, at + count * 12)
        self._check_places(count)

    def _check_places(self, count: int) -> None:
        """Lengths, offsets and marks must tell the same story; checked in blocks, so memory stays small."""
        place = 0
        for start in range(0, count, BLOCK):
            sizes = self.sizes[start:start + BLOCK].astype(np.int64)
            if sizes.min() < 0:
                raise self._corrupt(f"sequence {start + int(sizes.argmin())} has the length {sizes.min()}")
            ends = place + np.cumsum(sizes) * self.dtype.itemsize
            starts = ends - sizes * self.dtype.itemsize
            wrong = np.flatnonzero(starts != self._offsets[start:start + BLOCK])
            if wrong.size:
                raise self._corrupt(f"the offset of sequence {start + int(wrong[0])} does not follow from the lengths")
            place = int(ends[-1])
        self._bytes = place
        marks = self.document_indices
        if len(marks) == 0 or marks[0] != 0 or marks[-1] != count:
            raise self._corrupt(f"its document marks must run from 0 to {count}")

    def _check_bin(self) -> None:
        size = self.bin_path.stat().st_size
        if size < self._bytes:
            kind = placeholder_kind(self.bin_path)
            what = f"this is {kind}" if kind else "it was cut short"
            raise ConfigError(f"{self.bin_path}: {what}: its index asks for {self._bytes} bytes, it has {size}; "
                              "copy it again.")
        if size > self._bytes:
            raise ConfigError(f"{self.bin_path}: it has {size} bytes and its index describes {self._bytes}; "
                              "the two files are not of one run, copy both again.")

    def __len__(self) -> int:
        return len(self.sizes)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens `offset` to `offset + length` (default: the end) of sequence `i`, as a view of the mapped file."""
        if length is None:
            length = int(self.sizes[i]) - offset
        start = int(self._offsets[i]) + offset * self.dtype.itemsize
        return self._tokens[start:start + length * self.dtype.itemsize].view(self.dtype)
