"""What readers hand to workers: batches of rows that know where they come from."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modellink.config.errors import ConfigError

BATCH_ROWS = 1000
BATCH_BYTES = 512 * 1024


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one file.

    Attributes:
        path: the file.
        unit: what the numbers count, `line` or `row`.
        numbers: line or row of each row in the file, from 1.
        rows: JSON texts (bytes), or tuples with one value per wanted column.
        names: the columns of rows that are tuples.
        source: which input of the run the rows belong to.
    """

    path: Path
    unit: str
    numbers: list[int]
    rows: list[Any]
    names: tuple[str, ...] = ()
    source: int = 0

    def place(self, i: int) -> str:
        """Where row `i` stands, for messages."""
        return f"{self.path}, {self.unit} {self.numbers[i]}"

    def names_of(self, i: int) -> tuple[str, ...]:
        """Columns of row `i`."""
        return self.names

    def source_of(self, i: int) -> int:
        """Input that row `i` belongs to."""
        return self.source


@dataclasses.dataclass(frozen=True)
class MixedBatch(Batch):
    """Rows of several files.

    Attributes:
        origins: the batch that each row was taken from, and its place there.
    """

    origins: Sequence[tuple[Batch, int]] = ()

    def place(self, i: int) -> str:
        batch, at = self.origins[i]
        return batch.place(at)

    def names_of(self, i: int) -> tuple[str, ...]:
        return self.origins[i][0].names

    def source_of(self, i: int) -> int:
        return self.origins[i][0].source


def group(path: Path, unit: str, rows: Iterable[tuple[int, Any, int]], names: Sequence[str] = ()) -> Iterator[Batch]:
    """Batches of at most BATCH_ROWS rows and about BATCH_BYTES.

    Args:
        rows: (number, row, size in bytes or characters).
        names: columns of the rows.
    """
    numbers: list[int] = []
    values: list[Any] = []
    total = 0
    for number, value, size in rows:
        numbers.append(number)
        values.append(value)
        total += size
        if len(values) == BATCH_ROWS or total >= BATCH_BYTES:
            yield Batch(path, unit, numbers, values, tuple(names))
            numbers, values, total = [], [], 0
    if values:
        yield Batch(path, unit, numbers, values, tuple(names))


def missing_column(place: str, column: str, found: Iterable[str], flag: str = "--json-keys") -> ConfigError:
    """The sentence for a column that is not there."""
    names = ", ".join(found) or "none"
    return ConfigError(f"{place}: no column {column!r}, the columns are {names}; name the right one with {flag}.")


def not_utf8(place: str, error: UnicodeDecodeError) -> ConfigError:
    """The sentence for bytes that are no UTF-8 text."""
    return ConfigError(f"{place}: not UTF-8 text ({error.reason}); convert the file to UTF-8.")
