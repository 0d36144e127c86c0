"""Several data sets mixed in given shares."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from modellink.config.errors import ConfigError
from modellink.data.index_cache import cached_arrays


def parse_blend(words: Sequence[str], flag: str) -> tuple[list[str], list[float] | None]:
    """Read `A`, `A B ...` or `0.3 A 0.7 B ...`.

    Args:
        words: the values of the flag.
        flag: its name, for the error.

    Returns:
        The prefixes, and their weights divided by their sum (None when none were given).
    """
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return list(words), None
    if len(words) % 2 or any(number is None for number in numbers[::2]):
        raise ConfigError(f"{flag} {' '.join(words)}: give either prefixes alone or a weight before every prefix, "
                          "as in 0.3 A 0.7 B.")
    weights = [number or 0.0 for number in numbers[::2]]
    if not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"{flag} {' '.join(words)}: every weight must be a number above 0; "
                          "leave out a data set that is not wanted.")
    return list(words[1::2]), normalised(weights)


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    array = np.array(weights, np.float64)
    return (array / array.sum()).tolist()


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def blend_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which data set gives each sample: always the one that lags its share most, so shares hold in every prefix.

    The rule is megatron-core's, and so is the order.

    Args:
        weights: shares that add up to 1.
        size: number of samples.

    Returns:
        data set of each sample, int16 [size], and the number of the sample in it, int64 [size].
    """
    counts = [0] * len(weights)
    which = np.empty(size, np.int16)
    number = np.empty(size, np.int64)
    for i in range(size):
        step = max(i, 1)
        lag = [weight * step - count for weight, count in zip(weights, counts)]
        best = lag.index(max(lag))
        which[i] = best
        number[i] = counts[best]
        counts[best] += 1
    return which, number


class Part(Protocol):
    """A data set of a blend."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]: ...


class BlendedDataset(Dataset[dict[str, torch.Tensor]]):
    """Samples of several data sets in the order of `blend_indices`.

    Args:
        datasets: one per share, long enough for it.
        weights: shares, divided by their sum here.
        size: number of samples.
        cache_dir, build: as in GPTDataset.
    """

    def __init__(self, datasets: Sequence[Part], weights: Sequence[float], size: int,
                 cache_dir: Path | None = None, build: bool = True):
        self.datasets: list[Part] = list(datasets)
        self.weights = normalised(weights)
        self.dataset_index, self.dataset_sample_index = cached_arrays(
            cache_dir, "BlendedDataset", {"version": 1, "weights": self.weights, "size": size},
            ("dataset_index", "dataset_sample_index"), lambda: blend_indices(self.weights, size), build)

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """As the data set that gives sample `i`."""
        return self.datasets[self.dataset_index[i]][int(self.dataset_sample_index[i])]
