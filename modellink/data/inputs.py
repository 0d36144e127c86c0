"""Which files a run reads, and in which order it takes their rows."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from modellink.config.errors import ConfigError
from modellink.config.files import read_json
from modellink.data.batches import BATCH_ROWS, Batch, MixedBatch
from modellink.data.handlers.records import KeyMap, key_map
from modellink.data.readers import find_files, read_batches

DATASET_INFO = "dataset_info.json"
CONCAT, UNDER, OVER = "concat", "interleave_under", "interleave_over"
STRATEGIES = (CONCAT, UNDER, OVER)
DRAWS = 1 << 14  # random choices made at once


@dataclasses.dataclass(frozen=True)
class Source:
    """One input.

    Attributes:
        name: as given.
        files, kind, left_out: from `readers.find_files`.
        key_map: names in it, where dataset_info.json tells them.
        pairwise: whether dataset_info.json says that it holds preferences; None without it.
    """

    name: str
    files: list[Path]
    kind: str
    left_out: list[str]
    key_map: KeyMap | None = None
    pairwise: bool | None = None


def find_sources(inputs: Sequence[str], dataset_dir: str | None, text_format: str | None) -> list[Source]:
    """Open the names of --input: files or folders, or entries of dataset_info.json in --dataset-dir.

    A name that is no file is cut at its commas.

    Raises:
        ConfigError: something named is not there.
    """
    info = _dataset_info(dataset_dir)
    names = [name for word in inputs
             for name in ([word] if "," not in word or _path(word, dataset_dir).exists() else word.split(","))]
    return [_source(name.strip(), dataset_dir, info, text_format) for name in names if name.strip()]


def _path(name: str, dataset_dir: str | None) -> Path:
    return Path(dataset_dir, name) if dataset_dir else Path(name)


def _dataset_info(dataset_dir: str | None) -> dict[str, dict]:
    if dataset_dir is None:
        return {}
    if not Path(dataset_dir).is_dir():
        raise ConfigError(f"--dataset-dir {dataset_dir}: no such folder; give the one that the inputs lie in.")
    path = Path(dataset_dir) / DATASET_INFO
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ConfigError(f"{path}: must be an object with one object for every data set; mend it.")
    return found


def _source(name: str, dataset_dir: str | None, info: dict[str, dict], text_format: str | None) -> Source:
    if name not in info:
        path = _path(name, dataset_dir)
        if info and not path.exists():
            raise ConfigError(f"--input {name}: neither a data set of {Path(dataset_dir or '') / DATASET_INFO} nor a "
                              f"file beside it; it has {', '.join(info)}.")
        return Source(name, *find_files(path, text_format))
    entry, where = info[name], f"{Path(dataset_dir or '') / DATASET_INFO}, {name}"
    file = entry.get("file_name")
    if not isinstance(file, str):
        raise ConfigError(f"{where}: has no file_name, and data sets of a hub are not fetched; download it and name "
                          "its file.")
    names = key_map({**entry.get("columns", {}), "tags": entry.get("tags", {})}, where)
    return Source(name, *find_files(_path(file, dataset_dir), text_format), names, bool(entry.get("ranking")))


def _batches(source: Source, number: int, columns: Sequence[str] | None, most: int | None) -> Iterator[Batch]:
    """The first `most` rows of a source."""
    left = most
    for batch in read_batches(source.files, source.kind, columns):
        if left is not None and len(batch.rows) >= left:
            yield dataclasses.replace(batch, source=number, rows=batch.rows[:left], numbers=batch.numbers[:left])
            return
        left = None if left is None else left - len(batch.rows)
        yield dataclasses.replace(batch, source=number)


def _rows(source: Source, number: int, columns: Sequence[str] | None, most: int | None) -> Iterator[tuple[Batch, int]]:
    for batch in _batches(source, number, columns, most):
        # only what messages need is kept of the batch, so a mixed batch does not carry whole others to the workers
        for i, row in enumerate(batch.rows):
            yield dataclasses.replace(batch, rows=[row], numbers=batch.numbers[i:i + 1]), 0


def _choices(shares: Sequence[float] | None, count: int, seed: int) -> Iterator[int]:
    """Which source gives the next row: in turn, or at random in given shares."""
    if shares is None:
        return itertools.cycle(range(count))
    random = np.random.default_rng(seed)
    weights = np.array(shares, np.float64)
    draw = weights / weights.sum()
    return (int(choice) for _ in itertools.count() for choice in random.choice(count, DRAWS, p=draw))


def _interleaved(sources: Sequence[Source], columns: Sequence[str] | None, most: int | None, over: bool,
                 shares: Sequence[float] | None, seed: int) -> Iterator[tuple[Batch, int]]:
    """Rows until the first source has ended, or (`over`) until all have, those that end earlier starting again."""
    readers = [_rows(source, number, columns, most) for number, source in enumerate(sources)]
    upcoming = [next(reader, None) for reader in readers]
    for source, row in zip(sources, upcoming):
        if row is None:
            raise ConfigError(f"--input {source.name}: it has no rows to interleave; leave it out.")
    ended = [False] * len(sources)
    for choice in _choices(shares, len(sources), seed):
        row = upcoming[choice]
        assert row is not None
        yield row
        upcoming[choice] = next(readers[choice], None)
        if upcoming[choice] is None:
            ended[choice] = True
            if not over or all(ended):
                return
            readers[choice] = _rows(sources[choice], choice, columns, most)
            upcoming[choice] = next(readers[choice])


def mixed_batches(sources: Sequence[Source], columns: Sequence[str] | None, *, strategy: str = CONCAT,
                  shares: Sequence[float] | None = None, most: int | None = None, seed: int = 1234) -> Iterator[Batch]:
    """The rows of all sources.

    Args:
        columns: wanted columns; None: all.
        strategy: `concat`: one source after the other; `interleave_under`: until the first has ended;
            `interleave_over`: until every one has been seen whole.
        shares: of each source in an interleaved order; None: in turn.
        most: the most rows of a source.
        seed: of the random order.
    """
    if strategy == CONCAT or len(sources) == 1:
        for number, source in enumerate(sources):
            yield from _batches(source, number, columns, most)
        return
    rows = _interleaved(sources, columns, most, strategy == OVER, shares, seed)
    while origins := list(itertools.islice(rows, BATCH_ROWS)):
        first = origins[0][0]
        yield MixedBatch(first.path, first.unit, [batch.numbers[i] for batch, i in origins],
                         [batch.rows[i] for batch, i in origins], first.names, first.source,
                         [(dataclasses.replace(batch, rows=[]), i) for batch, i in origins])


def parse_shares(words: Sequence[str] | None, count: int, strategy: str) -> list[float] | None:
    """Read --interleave-probs: numbers, also with commas between them.

    Raises:
        ConfigError: not one number above 0 for each input.
    """
    if not words:
        return None
    text = " ".join(words)
    try:
        shares = [float(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise ConfigError(f"--interleave-probs {text}: must be numbers, as in 0.7 0.3.") from error
    if strategy == CONCAT:
        raise ConfigError(f"--interleave-probs {text}: has a meaning only with --mix-strategy interleave_under or "
                          "interleave_over; give one of them.")
    if len(shares) != count or not all(0 < share < float("inf") for share in shares):
        raise ConfigError(f"--interleave-probs {text}: {count} inputs need {count} numbers above 0.")
    return shares
