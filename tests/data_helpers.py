"""Small token files and tokenizers that the data tests share."""

import pydoc_data.topics
import re
from pathlib import Path

import numpy as np

from modellink.data.indexed import IndexedWriter
from modellink.data.train_tokenizer import train_tokenizer


def topics() -> list[str]:
    """Real text that every Python has: the reference topics, sorted by name."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def paragraphs(count: int) -> list[str]:
    """The first `count` paragraphs of the topics."""
    found = [part for text in topics() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return found[:count]


def make_tokenizer(folder: Path, vocab_size: int = 800) -> Path:
    """Train a tokenizer on the topics and return its folder."""
    train_tokenizer(topics(), vocab_size, folder)
    return folder


def random_documents(count: int, seed: int, longest: int = 40, vocab_size: int = 900,
                     shortest: int = 1) -> list[np.ndarray]:
    """Documents of random length and tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(vocab_size, size=random.integers(shortest, longest + 1)).astype(np.int32)
            for _ in range(count)]


def write_documents(prefix: Path, documents: list[np.ndarray]) -> str:
    """Write token files in one go and return the prefix."""
    with IndexedWriter(prefix) as writer:
        writer.append(np.concatenate(documents), np.array([len(document) for document in documents], np.int32))
    return str(prefix)
