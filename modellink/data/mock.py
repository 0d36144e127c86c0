"""Samples without files, for dry runs and benchmarks; a model can learn them."""

import numpy as np
import torch
from torch.utils.data import Dataset

STEPS = 4
NOISE = 0.05


class MockDataset(Dataset[dict[str, torch.Tensor]]):
    """Counting in steps of 1 to 4 through the vocabulary, from a random start, 5% of the tokens replaced at random.

    Sample `i` depends on `seed` and `i` alone: every rank and every restart sees the same.

    Args:
        vocab_size: tokens are below it.
        seq_length: tokens of a sample.
        num_samples: number of samples.
        seed: of everything random.
    """

    def __init__(self, vocab_size: int, seq_length: int, num_samples: int, seed: int):
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """tokens and labels int64 [seq_length], labels one ahead, and loss_mask float32 [seq_length] of ones."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.num_samples}")
        random = np.random.default_rng((self.seed, i))
        start, step = random.integers(self.vocab_size), random.integers(1, STEPS + 1)
        text = (start + step * np.arange(self.seq_length + 1, dtype=np.int64)) % self.vocab_size
        noisy = random.random(self.seq_length + 1) < NOISE
        text[noisy] = random.integers(self.vocab_size, size=int(noisy.sum()))
        sample = torch.from_numpy(text)
        return {"tokens": sample[:-1], "labels": sample[1:], "loss_mask": torch.ones(self.seq_length)}
