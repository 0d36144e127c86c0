"""Fixed-length training samples cut from a stream of shuffled documents, in megatron-core's order."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from modellink.config.errors import ConfigError
from modellink.data.index_cache import cached_arrays, content_hash
from modellink.data.indexed import IndexedDataset

# megatron-core's rule: the last epoch is shuffled on its own when less than this share of it is used, so that
# its few samples do not mix into epochs that are seen whole
FINAL_EPOCH_THRESHOLD = 0.80


def document_order(documents: np.ndarray, epochs: int, separate_final: bool,
                   random: np.random.RandomState) -> np.ndarray:
    """int32 [epochs * documents]: all epochs shuffled together, or the last one on its own after the others."""
    parts = [epochs - 1, 1] if separate_final and epochs > 1 else [epochs]
    orders = []
    for part in parts:
        order = np.tile(documents.astype(np.int32), part)
        random.shuffle(order)
        orders.append(order)
    return np.concatenate(orders)


def sample_starts(sizes: np.ndarray, order: np.ndarray, samples: int, seq_length: int) -> np.ndarray:
    """Where each sample starts in the stream of ordered documents.

    Args:
        sizes: int32 [all documents], tokens of each.
        order: int32 [positions], document at each position of the stream.
        samples: number of samples; sample k starts at token k * seq_length of the stream.

    Returns:
        [samples + 1, 2] of (position in `order`, offset in that document); int32 where it fits.
    """
    ends = np.cumsum(sizes[order], dtype=np.int64)
    tokens = np.arange(samples + 1, dtype=np.int64) * seq_length
    position = np.searchsorted(ends, tokens, side="right")
    offset = tokens - ends[position] + sizes[order[position]]
    starts = np.stack([position, offset], axis=1)
    fits = max(len(order), int(sizes.max())) <= np.iinfo(np.int32).max
    return starts.astype(np.int32) if fits else starts


def shuffled_samples(first: int, total: int, random: np.random.RandomState) -> np.ndarray:
    """uint32 (int64 beyond 4 billion) [total]: the first `first` samples shuffled, then the rest shuffled."""
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    order = np.arange(total, dtype=dtype)
    random.shuffle(order[:first])
    if first < total:
        random.shuffle(order[first:])
    return order


class GPTDataset(Dataset[dict[str, torch.Tensor]]):
    """Samples of seq_length + 1 tokens that run across document boundaries; neighbours share one token.

    Documents are visited in shuffled order, as many epochs as `num_samples` needs, and the samples are shuffled
    again; the order equals megatron-core's GPTDataset for the same seed, documents and sizes.

    Args:
        indexed: the token files.
        document_range: (first, one past the last) document to use.
        num_samples: samples wanted at least; None: one epoch.
        seq_length: tokens the model sees.
        seed: of both shuffles.
        cache_dir: where the index is kept; None: in memory.
        build: whether this process writes a missing index.
        vocab_size: rows of the model's vocabulary; a token beyond them is an error.

    Raises:
        ConfigError: the range holds too few tokens for one sample.
    """

    def __init__(self, indexed: IndexedDataset, document_range: tuple[int, int], num_samples: int | None,
                 seq_length: int, seed: int, cache_dir: Path | None = None, build: bool = True,
                 vocab_size: int | None = None):
        self.indexed = indexed
        self.documents = np.arange(*document_range, dtype=np.int32)
        self.num_samples = num_samples
        self.seq_length = seq_length
        self.seed = seed
        self.vocab_size = vocab_size
        self._tokens_per_epoch = int(indexed.sizes[slice(*document_range)].sum(dtype=np.int64))
        if self._tokens_per_epoch == 0 or (num_samples is None and self._tokens_per_epoch <= seq_length):
            raise ConfigError(
                f"{indexed.prefix}: documents {document_range[0]} to {document_range[1] - 1} hold "
                f"{self._tokens_per_epoch} tokens, fewer than one sample of --seq-length {seq_length} + 1; "
                "use more text or a shorter --seq-length.")
        key = {"version": 1, "content": content_hash(indexed.sizes), "range": list(document_range),
               "num_samples": num_samples, "seq_length": seq_length, "seed": seed}
        self.document_index, self.sample_index, self.shuffle_index = cached_arrays(
            cache_dir, "GPTDataset", key, ("document_index", "sample_index", "shuffle_index"), self._build_index, build)

    def _build_index(self) -> list[np.ndarray]:
        per_epoch, seq_length = self._tokens_per_epoch, self.seq_length
        wanted = 0 if self.num_samples is None else self.num_samples * seq_length + 1
        epochs = max(1, -(-wanted // per_epoch))
        total = (epochs * per_epoch - 1) // seq_length
        before_final = ((epochs - 1) * per_epoch - 1) // seq_length
        separate_final = False
        if epochs > 1 and self.num_samples is not None:
            from_final = self.num_samples - before_final
            separate_final = from_final < int(FINAL_EPOCH_THRESHOLD * ((per_epoch - 1) // seq_length))
        random = np.random.RandomState(self.seed)  # the generator megatron-core uses; its streams never change
        order = document_order(self.documents, epochs, separate_final, random)
        starts = sample_starts(self.indexed.sizes, order, total, seq_length)
        return [order, starts, shuffled_samples(before_final if separate_final else total, total, random)]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def tokens(self, i: int) -> np.ndarray:
        """int64 [seq_length + 1] of sample `i`."""
        sample = int(self.shuffle_index[i])
        (first, start), (last, end) = self.sample_index[sample:sample + 2].tolist()
        if first == last:
            parts = [self.indexed.get(self.document_index[first], start, end - start + 1)]
        else:
            middle = [self.indexed.get(document) for document in self.document_index[first + 1:last]]
            parts = [self.indexed.get(self.document_index[first], start), *middle,
                     self.indexed.get(self.document_index[last], 0, end + 1)]
        text = np.concatenate(parts, dtype=np.int64)
        if self.vocab_size is not None and (text.max() >= self.vocab_size or text.min() < 0):
            wrong = text.max() if text.max() >= self.vocab_size else text.min()
            raise ConfigError(f"{self.indexed.bin_path}: it holds the token id {wrong}, and the model's vocabulary has "
                              f"{self.vocab_size} rows; use data made with this model's tokenizer.")
        return text

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """tokens and labels int64 [seq_length], labels one ahead, and loss_mask float32 [seq_length] of ones."""
        text = torch.from_numpy(self.tokens(i))
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(self.seq_length)}
