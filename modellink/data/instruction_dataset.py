"""Instruction samples for training: one document is one sample, in a shuffled order of whole epochs."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from modellink.config.errors import ConfigError, ProblemList
from modellink.data.bins import pack_bins
from modellink.data.blend import BlendedDataset, parse_blend
from modellink.data.chat_encode import IGNORED
from modellink.data.datasets import SPLITS, SplitBuilder, check_choice, parse_split
from modellink.data.handlers.dialogues import STREAMS
from modellink.data.index_cache import cached_arrays, content_hash
from modellink.data.indexed import IndexedDataset, data_files


class InstructionStreams:
    """The three streams of a prefix.

    Args:
        prefix: PREFIX of PREFIX_packed_input_ids_document and its fellows; one of their names stands for it.

    Raises:
        ConfigError: a stream is missing or broken, or they do not belong together.
    """

    def __init__(self, prefix: str | Path):
        text = str(prefix)
        for name in STREAMS:
            text = text.removesuffix(f"_{name}_document")
        self.prefix = text
        names = [f"{text}_{name}_document" for name in STREAMS]
        if not any(path.is_file() for name in names for path in data_files(name)):
            if all(path.is_file() for path in data_files(text)):
                raise ConfigError(f"{text}: holds plain text without labels; remove --is-instruction-dataset, or "
                                  "preprocess the records with an instruction handler.")
            if data_files(f"{text}_packed_chosen_labels_document")[0].is_file():
                raise ConfigError(f"{text}: holds preference pairs, which --stage dpo trains on; instruction tuning "
                                  "needs data of an instruction handler.")
        self.tokens, self.mask, self.labels = (IndexedDataset(name) for name in names)
        self.sizes = self.tokens.sizes
        for stream in (self.mask, self.labels):
            if not np.array_equal(stream.sizes, self.sizes):
                raise ConfigError(f"{stream.prefix}: its samples have other lengths than those of "
                                  f"{self.tokens.prefix}; the files are not of one run, preprocess the data again.")

    def __len__(self) -> int:
        return len(self.sizes)


class InstructionDataset(Dataset[dict[str, torch.Tensor]]):
    """Whole samples, unpadded.

    Every epoch visits each sample once, in an order of its own.

    Args:
        source: prefix, or its open streams.
        document_range: (first, one past the last) sample to use.
        num_samples: samples wanted at least; None: one epoch.
        seed: of the shuffles.
        cache_dir: where the order is kept; None: in memory.
        build: whether this process writes a missing order.
        vocab_size: rows of the model's vocabulary; a token beyond them is an error.
        seq_length: tokens the model sees; longer samples are cut there. None: samples stay whole.
    """

    def __init__(self, source: str | Path | InstructionStreams, document_range: tuple[int, int],
                 num_samples: int | None, seed: int, cache_dir: Path | None = None, build: bool = True,
                 vocab_size: int | None = None, seq_length: int | None = None):
        self.indexed = source if isinstance(source, InstructionStreams) else InstructionStreams(source)
        self.documents = np.arange(*document_range, dtype=np.int32)
        self.num_samples = num_samples
        self.seed = seed
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.cache_dir = cache_dir
        self.build = build
        if not len(self.documents):
            raise ConfigError(f"{self.indexed.prefix}: the range {document_range[0]} to {document_range[1]} has no "
                              "samples; change --split or use a larger data set.")
        self._key = {"version": 1, "content": content_hash(self.indexed.sizes), "range": list(document_range),
                     "num_samples": num_samples, "seed": seed}
        self.order, = cached_arrays(cache_dir, "InstructionDataset", self._key, ("order",), self._build_order, build)

    def _build_order(self) -> list[np.ndarray]:
        per_epoch = len(self.documents)
        epochs = max(1, -(-(self.num_samples or 0) // per_epoch))
        random = np.random.RandomState(self.seed)
        order = np.tile(self.documents, epochs)
        for epoch in range(epochs):
            random.shuffle(order[epoch * per_epoch:(epoch + 1) * per_epoch])
        return [order]

    def __len__(self) -> int:
        return len(self.order)

    @functools.cached_property
    def sample_lengths(self) -> np.ndarray:
        """int32 [len(self)]: tokens that the model sees of each sample."""
        lengths = np.maximum(self.indexed.sizes[self.order] - 1, 0)
        return lengths if self.seq_length is None else np.minimum(lengths, self.seq_length)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """tokens int64 [n], labels int64 [n] one ahead with -100 where nothing is learnt, loss_mask float32 [n]."""
        document = int(self.order[i])
        end = None if self.seq_length is None else self.seq_length + 1
        tokens = self.indexed.tokens.get(document)[:end].astype(np.int64)
        labels = torch.from_numpy(self.indexed.labels.get(document)[:end].astype(np.int64))[1:]
        if self.vocab_size is not None and tokens.size and (tokens.max() >= self.vocab_size or tokens.min() < 0):
            wrong = tokens.max() if tokens.max() >= self.vocab_size else tokens.min()
            raise ConfigError(f"{self.indexed.tokens.bin_path}: it holds the token id {wrong}, and the model's "
                              f"vocabulary has {self.vocab_size} rows; use data made with this model's tokenizer.")
        return {"tokens": torch.from_numpy(tokens)[:-1], "labels": labels, "loss_mask": (labels != IGNORED).float()}


AnyInstructionDataset = InstructionDataset | BlendedDataset


def sample_lengths(dataset: AnyInstructionDataset) -> np.ndarray:
    """int32 [len(dataset)]: tokens that the model sees of each sample, of one set or of a blend."""
    if isinstance(dataset, InstructionDataset):
        return dataset.sample_lengths
    lengths = np.zeros(len(dataset), np.int32)
    for number, part in enumerate(dataset.datasets):
        assert isinstance(part, InstructionDataset)
        chosen = dataset.dataset_index == number
        lengths[chosen] = part.sample_lengths[dataset.dataset_sample_index[chosen]]
    return lengths


def dataset_bins(dataset: AnyInstructionDataset, capacity: int, seed: int, cache_dir: Path | None = None,
                 build: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """`pack_bins` of a set's samples, kept on disk: the same on every rank and after every restart.

    Args:
        dataset: one set or a blend, with a seq_length of at most `capacity`.
        capacity: tokens of a bin.
        seed: of the bins.
        cache_dir, build: as in InstructionDataset.
    """
    lengths = sample_lengths(dataset)
    key = {"version": 1, "content": content_hash(lengths), "capacity": capacity, "seed": seed}
    order, starts = cached_arrays(cache_dir, "bins", key, ("order", "starts"),
                                  lambda: pack_bins(lengths, capacity, seed), build)
    return order, starts


class _InstructionBuilder(SplitBuilder):
    """Builds the sets of one run from streams, shares and sizes."""

    cache_name = "InstructionDataset"

    def make(self, source: InstructionStreams, documents: tuple[int, int], samples: int | None) -> InstructionDataset:
        return InstructionDataset(source, documents, samples, self.seed, self.cache(source), self.build,
                                  self.vocab_size, self.seq_length)


def open_streams(data_path: list[str] | None, per_split: Sequence[list[str] | None]) -> dict[str, InstructionStreams]:
    """Open the streams of every prefix that the flags name; all problems are raised at once."""
    problems = ProblemList()
    opened: dict[str, InstructionStreams] = {}
    flags = ("--data-path", *(f"--{split}-data-path" for split in SPLITS))
    for flag, words in zip(flags, (data_path, *per_split)):
        parsed = problems.catch(functools.partial(parse_blend, words or [], flag))
        for prefix in parsed[0] if isinstance(parsed, tuple) else []:
            if prefix not in opened:
                source = problems.catch(functools.partial(InstructionStreams, prefix))
                if isinstance(source, InstructionStreams):
                    opened[prefix] = source
    problems.raise_if_any()
    return opened


def build_instruction_datasets(
        *, data_path: list[str] | None, split: str | None, train_data_path: list[str] | None,
        valid_data_path: list[str] | None, test_data_path: list[str] | None, vocab_size: int,
        num_samples: tuple[int, int, int], seq_length: int, seed: int, cache_dir: Path | None, build: bool,
        ) -> tuple[AnyInstructionDataset | None, AnyInstructionDataset | None, AnyInstructionDataset | None]:
    """The sets of a tuning run, by the rules of `datasets.build_datasets`; each has at least the samples asked for.

    Args:
        As there; prefixes are those given to --output-prefix, and samples are cut at `seq_length`.

    Returns:
        train, valid, test; None for a set that is not wanted or whose split is empty.

    Raises:
        ConfigError: flags that contradict each other, or data that is missing or broken.
    """
    per_split = (train_data_path, valid_data_path, test_data_path)
    check_choice(data_path, split, per_split, False)
    shares = parse_split(split)
    sources = open_streams(data_path, per_split)
    builder = _InstructionBuilder(vocab_size, seq_length, seed, cache_dir, build)
    sets = builder.all_splits(data_path, per_split, shares, sources, num_samples, split)
    return sets[0], sets[1], sets[2]
