"""Read documents from files, a batch at a time, in order, without holding a file whole.

JSON rows stay text (bytes) until a worker parses them, which spreads that work over the processes; the other formats
give tuples of the wanted columns, or of all columns when none are named.
"""

import codecs
import csv
import dataclasses
import gzip
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from modellink.config.errors import ConfigError
from modellink.config.files import check_real, near_path_hint
from modellink.data.batches import BATCH_ROWS, Batch, group, missing_column, not_utf8
from modellink.data.json_list import records

GZIP = ".gz"
ARTICLES = "articles"
HEADING = re.compile(r"\s*= [^=](.*[^=])? =\s*")


def extension(path: Path) -> str:
    """Format by extension, without the dot; `.gz` after a text format is looked through."""
    name = path.name.lower()
    packed = name.endswith(GZIP)
    kind = Path(name.removesuffix(GZIP)).suffix[1:]
    return "" if packed and kind in BINARY else kind


def find_files(path: Path, text_format: str | None = None) -> tuple[list[Path], str, list[str]]:
    """The files to read.

    Args:
        path: a file, or a folder: the files of its most frequent known format, sorted by name.
        text_format: read text files as this format, and every unknown file name as a text file.

    Returns:
        the files, their format, and the names of the files in the folder that are left out.

    Raises:
        ConfigError: nothing is there, or nothing of a known format.
    """
    known = ", ".join(FORMATS)

    def file_format(path: Path) -> str:
        kind = extension(path)
        if text_format and (kind == "txt" or kind not in READERS):
            return text_format
        return "" if kind == ARTICLES else kind

    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        counts = Counter(file_format(entry) for entry in entries if file_format(entry) in READERS)
        if not counts:
            found = ", ".join(entry.name for entry in entries[:5]) or "no files"
            raise ConfigError(f"--input {path}: no file of a known format ({known}) lies in this folder, "
                              f"found {found}.")
        best = max(counts, key=lambda name: (counts[name], name))
        files = [entry for entry in entries if file_format(entry) == best]
        return [check_real(file) for file in files], best, [entry.name for entry in entries if entry not in files]
    if not path.exists():
        raise ConfigError(f"--input {path}: no such file or folder{near_path_hint(path)}.")
    if file_format(path) not in READERS:
        raise ConfigError(f"--input {path}: unknown format {path.suffix or '(no extension)'}; use one of {known}.")
    return [check_real(path)], file_format(path), []


def read_batches(files: Sequence[Path], kind: str, columns: Sequence[str] | None) -> Iterator[Batch]:
    """Every row of `files`, in order.

    Args:
        files, kind: from `find_files`.
        columns: wanted columns; None: all there are.

    Raises:
        ConfigError: a file that cannot be read as its format, or that lacks a column.
    """
    for path in files:
        try:
            yield from READERS[kind](path, columns)
        except (OSError, EOFError) as error:  # EOFError: a gzip file that ends early
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{path}: cannot read: {reason}; fetch the file again.") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.name.lower().endswith(GZIP) else open(path, "rb"))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line without its end) of every line."""
    with _open(path) as handle:
        for number, line in enumerate(handle, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            yield number, line.rstrip(b"\r\n")


def _read_text(path: Path, columns: Sequence[str] | None) -> Iterator[Batch]:
    """One document per line."""
    columns = ["text"] if columns is None else columns
    for column in columns:
        _place(path, ["text"], column)

    def rows() -> Iterator[tuple[int, tuple[str, ...], int]]:
        for number, line in _lines(path):
            try:
                yield number, (line.decode("utf-8"),) * len(columns), len(line)
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}, line {number}", error) from error

    return group(path, "line", rows(), columns)


def _read_articles(path: Path, columns: Sequence[str] | None) -> Iterator[Batch]:
    """Text whose documents begin at ` = Title = ` headings, as WikiText has it."""
    def rows() -> Iterator[tuple[int, tuple[str, ...], int]]:
        lines: list[str] = []
        begin, size = 1, 0
        for number, raw in _lines(path):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}, line {number}", error) from error
            if HEADING.fullmatch(line) and lines:
                yield begin, ("\n".join(lines).strip(),), size
                begin, lines, size = number, [], 0
            lines.append(line)
            size += len(line)
        if lines:
            yield begin, ("\n".join(lines).strip(),), size

    return group(path, "line", rows(), ("text",))


def _read_jsonl(path: Path, columns: Sequence[str] | None) -> Iterator[Batch]:
    """One JSON object per line; blank lines between them mean nothing."""
    return group(path, "line", ((number, line, len(line)) for number, line in _lines(path) if line.strip()))


def _read_json(path: Path, columns: Sequence[str] | None) -> Iterator[Batch]:
    """A list of objects, or the lines of a .jsonl under another name."""
    with _open(path) as handle:
        is_list = handle.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    if not is_list:
        yield from _read_jsonl(path, columns)
        return
    with _open(path) as raw:
        text = io.TextIOWrapper(raw, "utf-8-sig", newline="")
        yield from group(path, "line", ((line, record, len(record)) for line, record in records(text, path)))


def _read_csv(path: Path, columns: Sequence[str] | None) -> Iterator[Batch]:
    """A table with a header line; quoted fields may hold line ends."""
    csv.field_size_limit(sys.maxsize)
    with _open(path) as raw:
        reader = csv.reader(io.TextIOWrapper(raw, "utf-8-sig", newline=""), strict=True)
        header: list[str] = []

        def rows() -> Iterator[tuple[int, tuple[str, ...], int]]:
            header.extend(next(reader, []))
            places = [_place(path, header, column) for column in columns or header]
            for row in reader:
                if len(row) > max(places):
                    values = tuple(row[place] for place in places)
                    yield reader.line_num, values, sum(map(len, values))
                elif row:  # an empty row is a blank line
                    raise ConfigError(f"{path}, line {reader.line_num}: {len(row)} fields where the header has "
                                      f"{len(header)}; mend or remove this row.")

        try:
            for batch in group(path, "line", rows()):
                yield dataclasses.replace(batch, names=tuple(columns or header))
        except UnicodeDecodeError as error:
            raise not_utf8(str(path), error) from error
        except csv.Error as error:
            raise ConfigError(f"{path}, line {reader.line_num}: not valid CSV: {error}; mend this row.") from error


def _place(path: Path, header: Sequence[str], column: str) -> int:
    if column not in header:
        raise missing_column(str(path), column, header)
    return header.index(column)


def _table(path: Path, tables: Iterable[Any], columns: Sequence[str]) -> Iterator[Batch]:
    """Arrow record batches as Batches."""
    def rows() -> Iterator[tuple[int, tuple[Any, ...], int]]:
        number = 0
        for table in tables:
            values = [table.column(table.schema.get_field_index(column)).to_pylist() for column in columns]
            for row in zip(*values):
                number += 1
                yield number, row, sum(len(value) for value in row if isinstance(value, str))

    return group(path, "row", rows(), columns)


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[Batch]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names if columns is None else columns
            for column in columns:
                _place(path, file.schema_arrow.names, column)
            yield from _table(path, file.iter_batches(BATCH_ROWS, columns=list(columns)), columns)
    except pyarrow.ArrowInvalid as error:
        raise _not_whole(path, "parquet", error) from error


def _read_arrow(path: Path, columns: Sequence[str] | None) -> Iterator[Batch]:
    """Arrow's stream form, which the datasets library writes, or its file form."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file_form = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pyarrow.ipc.open_file(source) if is_file_form else pyarrow.ipc.open_stream(source)
            columns = reader.schema.names if columns is None else columns
            for column in columns:
                _place(path, reader.schema.names, column)
            tables = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file_form else reader
            yield from _table(path, tables, columns)
    except pyarrow.ArrowInvalid as error:
        raise _not_whole(path, "arrow", error) from error


def _not_whole(path: Path, kind: str, error: Exception) -> ConfigError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ConfigError(f"{path}: not a whole {kind} file: {reason}; fetch the file again.")


READERS: dict[str, Callable[[Path, Sequence[str] | None], Iterator[Batch]]] = {
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "txt": _read_text,
    ARTICLES: _read_articles,
}
BINARY = ("parquet", "arrow")
FORMATS = tuple(name for name in READERS if name != ARTICLES)
