"""Preference pairs for training: two whole samples each, in a shuffled order of whole epochs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from modellink.config.errors import ConfigError
from modellink.data.blend import parse_blend
from modellink.data.chat_encode import IGNORED
from modellink.data.datasets import SPLITS, SplitBuilder, check_choice, parse_split
from modellink.data.handlers.pairs import SIDES
from modellink.data.indexed import IndexedDataset, data_files

STREAMS = ("input_ids", "labels")


class PairStreams:
    """The token and label streams of both sides of a prefix.

    Raises:
        ConfigError: a stream is missing or broken, or the sides do not belong together.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        names = {(side, kind): f"{prefix}_packed_{side}_{kind}_document" for side in SIDES for kind in STREAMS}
        present = any(path.is_file() for name in names.values() for path in data_files(name))
        if not present and data_files(f"{prefix}_packed_labels_document")[0].is_file():
            raise ConfigError(f"{prefix}: holds instruction samples, not preference pairs; use --stage sft, or "
                              "preprocess the records with a pairwise handler.")
        self.streams = {key: IndexedDataset(name) for key, name in names.items()}
        counts = {len(stream) for stream in self.streams.values()}
        if len(counts) > 1:
            raise ConfigError(f"{prefix}: its streams hold {sorted(counts)} samples, but every pair has one in each; "
                              "the files are not of one run, preprocess the data again.")

    def __len__(self) -> int:
        return len(self.streams["chosen", "input_ids"])


class PairDataset(Dataset[list[dict[str, torch.Tensor]]]):
    """Pairs, unpadded: item i is [chosen, rejected], each with tokens, labels one ahead and loss_mask.

    Args:
        source: the streams.
        documents: (first, one past the last) pair to use.
        num_samples: pairs wanted at least; None: one epoch.
        seed: of the shuffle of each epoch.
        vocab_size: rows of the model's vocabulary; a token beyond them is an error.
        seq_length: tokens the model sees; longer samples are cut there.
    """

    def __init__(self, source: PairStreams, documents: tuple[int, int], num_samples: int | None, seed: int,
                 vocab_size: int, seq_length: int):
        self.indexed = source
        self.seed = seed
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        pairs = np.arange(*documents)
        epochs = max(1, -(-(num_samples or 0) // len(pairs)))
        self.order = np.concatenate([np.random.RandomState([seed, epoch]).permutation(pairs)
                                     for epoch in range(epochs)])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> list[dict[str, torch.Tensor]]:
        return [self._side(int(self.order[i]), side) for side in SIDES]

    def _side(self, document: int, side: str) -> dict[str, torch.Tensor]:
        end = self.seq_length + 1
        tokens = self.indexed.streams[side, "input_ids"].get(document)[:end].astype(np.int64)
        if tokens.size and (tokens.max() >= self.vocab_size or tokens.min() < 0):
            raise ConfigError(f"{self.indexed.prefix}: it holds the token id {tokens.max()}, and the model's "
                              f"vocabulary has {self.vocab_size} rows; use data made with this model's tokenizer.")
        labels = torch.from_numpy(self.indexed.streams[side, "labels"].get(document)[:end].astype(np.int64))[1:]
        return {"tokens": torch.from_numpy(tokens)[:-1], "labels": labels, "loss_mask": (labels != IGNORED).float()}


class _PairBuilder(SplitBuilder):
    cache_name = "PairDataset"

    def make(self, source: Any, documents: tuple[int, int], samples: int | None) -> Any:
        return PairDataset(source, documents, samples, self.seed, self.vocab_size, self.seq_length)


def build_pair_datasets(*, data_path: list[str] | None, split: str | None, train_data_path: list[str] | None,
                        valid_data_path: list[str] | None, test_data_path: list[str] | None, vocab_size: int,
                        num_samples: tuple[int, int, int], seq_length: int, seed: int, cache_dir: Path | None,
                        build: bool) -> tuple[Any, Any, Any]:
    """The sets of a preference run, by the rules of `datasets.build_datasets`."""
    per_split = (train_data_path, valid_data_path, test_data_path)
    check_choice(data_path, split, per_split, False)
    sources: dict[str, PairStreams] = {}
    for flag, words in zip(("--data-path", *(f"--{name}-data-path" for name in SPLITS)), (data_path, *per_split)):
        for prefix in parse_blend(words, flag)[0] if words else []:
            sources.setdefault(prefix, PairStreams(prefix))
    builder = _PairBuilder(vocab_size, seq_length, seed, cache_dir, build)
    sets = builder.all_splits(data_path, per_split, parse_split(split), sources, num_samples, split)
    return sets[0], sets[1], sets[2]
