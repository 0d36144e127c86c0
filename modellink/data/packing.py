"""Rows of several whole instruction samples."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset


class PackedDataset(Dataset[list[dict[str, Any]]]):
    """Bins of samples as rows; every epoch visits each bin once, in an order of its own.

    Args:
        samples: one epoch of whole samples.
        order: int64 [samples], sample numbers, those of a bin one after the other.
        starts: int64 [bins + 1]: bin b holds `order[starts[b]:starts[b + 1]]`.
        seed: of the order of bins in each epoch.
    """

    def __init__(self, samples: Any, order: np.ndarray, starts: np.ndarray, seed: int):
        self.samples = samples
        self.order = order
        self.starts = starts
        self.seed = seed
        self._epoch: tuple[int, np.ndarray] | None = None

    def bin(self, i: int) -> np.ndarray:
        """Sample numbers of row `i` of an endless sequence of epochs."""
        epoch, place = divmod(i, len(self.starts) - 1)
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.RandomState([self.seed, epoch]).permutation(len(self.starts) - 1)
            self._epoch = (epoch, order)
        number = self._epoch[1][place]
        return self.order[self.starts[number]:self.starts[number + 1]]

    def __getitem__(self, i: int) -> list[dict[str, Any]]:
        return [self.samples[int(sample)] for sample in self.bin(i)]
