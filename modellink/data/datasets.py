"""The training, validation and test sets that the flags ask for."""

import functools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from modellink.config.errors import ConfigError, ProblemList
from modellink.data.blend import BlendedDataset, Part, parse_blend
from modellink.data.gpt_dataset import GPTDataset
from modellink.data.indexed import IndexedDataset
from modellink.data.mock import MockDataset

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = "969,30,1"
SPLITS = ("train", "valid", "test")
# megatron-core builds each set of a blend a little larger than its share, so that rounding never runs out of samples
SURPLUS = 0.005

AnyDataset = GPTDataset | BlendedDataset | MockDataset
Range = tuple[float, float]


def parse_split(split: str | None) -> list[Range | None]:
    """Shares of train, valid and test as (begin, end) fractions of the documents; None for an empty one.

    Args:
        split: up to three numbers, as `969,30,1` (the default) or `100,0,0`; they need not add up to anything.
    """
    text = DEFAULT_SPLIT if split is None else split
    if not re.fullmatch(r"\s*\d*\.?\d+\s*([,/]\s*\d*\.?\d+\s*){0,2}", text):
        raise ConfigError(f"--split {text}: give up to three numbers from 0 up, for train, valid and test, "
                          f"as in {DEFAULT_SPLIT} or 100,0,0.")
    shares = [float(number) for number in re.split("[,/]", text)]
    shares += [0.0] * (len(SPLITS) - len(shares))
    total = sum(shares)
    if total == 0:
        raise ConfigError(f"--split {text}: every share is 0; at least one must be above 0.")
    ends = functools.reduce(lambda done, share: [*done, done[-1] + share / total], shares, [0.0])
    return [(begin, end) if end > begin else None for begin, end in zip(ends, ends[1:])]


class Source(Protocol):
    """Documents of one prefix."""

    prefix: str

    def __len__(self) -> int: ...


class SourcedPart(Part, Protocol):
    """A data set made of one source."""

    indexed: Any


class SplitBuilder:
    """Builds the sets of one run from prefixes, shares and sizes; subclasses say of what kind they are."""

    cache_name = "GPTDataset"

    def __init__(self, vocab_size: int, seq_length: int, seed: int, cache_dir: Path | None, build: bool):
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.seed = seed
        self.cache_dir = cache_dir
        self.build = build

    def make(self, source: Any, documents: tuple[int, int], samples: int | None) -> SourcedPart:
        """The set of some documents of a source."""
        return GPTDataset(source, documents, samples, self.seq_length, self.seed, self.cache(source), self.build,
                          self.vocab_size)

    def cache(self, indexed: Source, kind: str | None = None) -> Path:
        """Folder of the index."""
        return self.cache_dir or Path(indexed.prefix) / "cache" / f"{kind or self.cache_name}_indices"

    def _part(self, indexed: Source, share: Range, split: str, samples: int | None) -> SourcedPart | None:
        """One data set's documents of one split; None when rounding leaves it without any."""
        first, last = (int(round(edge * float(len(indexed)))) for edge in share)
        if first == last:
            if split == "train":
                raise ConfigError(f"{indexed.prefix}: its {len(indexed)} documents leave none for training; "
                                  "change --split or use a larger data set.")
            logger.warning("%s: no documents fall into the %s split; it is left out.", indexed.prefix, split)
            return None
        return self.make(indexed, (first, last), samples)

    def one_split(self, sources: Sequence[Source], weights: list[float] | None, share: Range, split: str,
                  samples: int) -> SourcedPart | BlendedDataset | None:
        """The set of one split with at least `samples` samples."""
        if len(sources) == 1 and weights is None:
            return self._part(sources[0], share, split, samples)
        if weights is None:
            parts = [self._part(source, share, split, None) for source in sources]
            lengths = [len(part) for part in parts if part is not None]
            if sum(lengths) >= samples:
                return self._blend([part for part in parts if part is not None], lengths, samples, share, split)
            # one epoch is too short: the same shares over as many epochs as it takes
            weights = [0.0 if part is None else len(part) / sum(lengths) for part in parts] if lengths else []
        wanted = [math.ceil(samples * weight) for weight in weights]
        built = [(self._part(source, share, split, math.ceil(count * (1 + SURPLUS))), weight)
                 for source, weight, count in zip(sources, weights, wanted) if weight > 0]
        present = [(part, weight) for part, weight in built if part is not None]
        return self._blend([part for part, _ in present], [weight for _, weight in present], sum(wanted), share, split)

    def _blend(self, parts: Sequence[SourcedPart], weights: Sequence[float], size: int, share: Range,
               split: str) -> BlendedDataset | None:
        if not parts:
            return None
        blend = BlendedDataset(parts, weights, size, self.cache(parts[0].indexed, "BlendedDataset"), self.build)
        # many small shares round up, and a large one then gives more than was built for it (megatron-core stops here)
        for i, count in enumerate(np.bincount(blend.dataset_index, minlength=len(parts)).tolist()):
            longer = self._part(parts[i].indexed, share, split, count) if count > len(parts[i]) else None
            blend.datasets[i] = longer or parts[i]
        return blend

    def all_splits(self, data_path: list[str] | None, per_split: Sequence[list[str] | None],
                   shares: Sequence[Range | None], sources: Mapping[str, Source],
                   num_samples: tuple[int, int, int], split: str | None) -> list[Any]:
        """train, valid and test; None for a set that is not wanted or whose split is empty.

        Raises:
            ConfigError: nothing is left for training.
        """
        built: list[Any] = []
        for i, (name, samples) in enumerate(zip(SPLITS, num_samples)):
            words = data_path or per_split[i]
            share = shares[i] if data_path else (0.0, 1.0)
            if not samples or not words or share is None:
                built.append(None)
                continue
            prefixes, weights = parse_blend(words, "--data-path" if data_path else f"--{name}-data-path")
            built.append(self.one_split([sources[prefix] for prefix in prefixes], weights, share, name, samples))
        if num_samples[0] and built[0] is None:
            raise ConfigError(f"--split {split}: nothing is left for training; its first share must be above 0."
                              if data_path else "--train-data-path is missing: training needs it.")
        return built


def check_choice(data_path: list[str] | None, split: str | None, per_split: Sequence[list[str] | None],
                 mock: bool) -> None:
    """Raise a ConfigError when the flags of the data contradict each other or name none."""
    problems = ProblemList()
    names = [f"--{split_name}-data-path" for split_name, words in zip(SPLITS, per_split) if words]
    given = [*(["--data-path"] if data_path else []), *names]
    if mock and given:
        problems.add(f"--mock-data with {' and '.join(given)}: mock data reads no files; give one or the other.")
    if data_path and names:
        problems.add(f"--data-path with {' and '.join(names)}: either one --data-path cut by --split, or one path "
                     "for each split; give one or the other.")
    if names and split is not None:
        problems.add(f"--split {split} with {' and '.join(names)}: each split has its own path, there is nothing to "
                     "cut; remove --split.")
    if not given and not mock:
        problems.add("--data-path is missing: give the prefix that tools/preprocess_data.py wrote, or --mock-data.")
    problems.raise_if_any()


def open_sources(data_path: list[str] | None, per_split: Sequence[list[str] | None]) -> dict[str, IndexedDataset]:
    """Open every data set that the flags name; all problems are raised at once."""
    problems = ProblemList()
    opened: dict[str, IndexedDataset] = {}
    flags = ("--data-path", *(f"--{split}-data-path" for split in SPLITS))
    for flag, words in zip(flags, (data_path, *per_split)):
        parsed = problems.catch(functools.partial(parse_blend, words or [], flag))
        for prefix in parsed[0] if isinstance(parsed, tuple) else []:
            if prefix not in opened:
                source = problems.catch(functools.partial(IndexedDataset, prefix))
                if isinstance(source, IndexedDataset):
                    opened[prefix] = source
    problems.raise_if_any()
    return opened


def build_datasets(*, data_path: list[str] | None, split: str | None, train_data_path: list[str] | None,
                   valid_data_path: list[str] | None, test_data_path: list[str] | None, mock: bool, vocab_size: int,
                   num_samples: tuple[int, int, int], seq_length: int, seed: int, cache_dir: Path | None, build: bool,
                   ) -> tuple[AnyDataset | None, AnyDataset | None, AnyDataset | None]:
    """The sets of a run; each has at least the samples asked for.

    Call it with `build=True` on one rank of every node, then on the node's other ranks: a node reads only the
    index cache it has written itself, a shared disk is not needed (and does no harm).

    Args:
        data_path: prefixes cut by `split`: `[A]`, `[A, B]` (weighted by size) or `[0.3, A, 0.7, B]`.
        split: shares of train, valid and test; None: Megatron's 969,30,1.
        train_data_path, valid_data_path, test_data_path: prefixes for each split instead, in the same forms.
        mock: no files, counting sequences.
        vocab_size: rows of the model's vocabulary.
        num_samples: samples wanted of train, valid and test; 0: that set is not built.
        seq_length: tokens of a sample.
        seed: of the order of documents and samples.
        cache_dir: --data-cache-path; None: `PREFIX/cache`, as Megatron has it.
        build: whether this process writes missing index files.

    Returns:
        train, valid, test; None for a set that is not wanted or whose split is empty.

    Raises:
        ConfigError: flags that contradict each other, or data that is missing, broken or too short.
    """
    per_split = (train_data_path, valid_data_path, test_data_path)
    check_choice(data_path, split, per_split, mock)
    if mock:
        sets = [MockDataset(vocab_size, seq_length, samples, seed + i) if samples else None
                for i, samples in enumerate(num_samples)]
        return sets[0], sets[1], sets[2]
    shares = parse_split(split)
    sources = open_sources(data_path, per_split)
    built = SplitBuilder(vocab_size, seq_length, seed, cache_dir, build).all_splits(
        data_path, per_split, shares, sources, num_samples, split)
    return built[0], built[1], built[2]
