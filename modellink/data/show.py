"""`modellink data show PREFIX`: samples in words, trained tokens coloured, and what the whole set looks like."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modellink.config.errors import ConfigError
from modellink.config.fields import flag
from modellink.config.parser import parse_sections
from modellink.data.chat_encode import IGNORED
from modellink.data.handlers.dialogues import STREAMS
from modellink.data.handlers.pairs import PAIR_STREAMS
from modellink.data.indexed import IndexedDataset, data_files
from modellink.data.prefix import missing_prefix_hint
from modellink.data.sidecar import read_sidecar
from modellink.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USAGE = "usage: modellink data show PREFIX [flags]; PREFIX is what --output-prefix was, or a PREFIX_text_document"
GREEN, RESET = "\x1b[32m", "\x1b[0m"
OPEN, CLOSE = "[[", "]]"  # around trained text where there are no colours
BINS = 16
BAR = 40
QUANTILES = (0.5, 0.9, 0.99)


@dataclasses.dataclass(frozen=True)
class ShowOptions:
    """What is shown"""

    samples: int = flag(3, "Samples to print.", metavar="N")
    first: int = flag(0, "The first one.", metavar="N")
    tokenizer_name_or_path: str | None = flag(None, "Tokenizer folder; without it the one that PREFIX.json names.",
                                              metavar="FOLDER")
    color: str = flag("auto", "Colour trained tokens; where there are no colours they stand in [[ ]].",
                      choices=("auto", "always", "never"))
    bins: int = flag(BINS, "Bars of the length histogram.", metavar="N")


def find_streams(prefix: str) -> list[tuple[str, IndexedDataset, IndexedDataset | None]]:
    """(name, tokens, labels) of what lies at a prefix: one for instructions or text, two for preference pairs.

    Raises:
        ConfigError: nothing lies there.
    """
    kinds = {"sample": (STREAMS[0], STREAMS[2]), "chosen": (PAIR_STREAMS[0], PAIR_STREAMS[2]),
             "rejected": (PAIR_STREAMS[3], PAIR_STREAMS[5])}
    found: list[tuple[str, IndexedDataset, IndexedDataset | None]] = []
    for name, streams in kinds.items():
        tokens, labels = (f"{prefix}_{stream}_document" for stream in streams)
        if data_files(tokens)[1].is_file():
            found.append((name, IndexedDataset(tokens), IndexedDataset(labels)))
    if found:
        return found
    for name in (prefix, f"{prefix}_text_document"):
        if data_files(name)[1].is_file():
            return [("document", IndexedDataset(name), None)]
    raise ConfigError(f"{prefix}: no token files lie there{missing_prefix_hint(prefix)}.")


def marked_text(tokenizer: "PreTrainedTokenizerBase", tokens: np.ndarray, learnt: np.ndarray, color: bool) -> str:
    """A sample in words, learnt stretches marked.

    Args:
        tokens: int [n].
        learnt: bool [n].
    """
    before, after = (GREEN, RESET) if color else (OPEN, CLOSE)
    borders = [0, *(np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1).tolist(), len(tokens)]
    parts: list[str] = []
    for begin, end in zip(borders, borders[1:]):
        if begin == end:
            continue
        text = tokenizer.decode(tokens[begin:end].tolist(), clean_up_tokenization_spaces=False)
        parts.append(f"{before}{text}{after}" if learnt[begin] else str(text))
    return "".join(parts)


def histogram(lengths: np.ndarray, bins: int) -> list[str]:
    """Lines of a histogram of sample lengths."""
    counts, edges = np.histogram(lengths, bins=min(bins, max(1, int(lengths.max() - lengths.min()) + 1)))
    width = len(f"{int(edges[-1]):,}")
    most = int(counts.max())
    return [f"  {int(np.ceil(low)):>{width},} to {int(high):>{width},} {count:>9,} "
            f"{'#' * round(BAR * count / most) if count else ''}".rstrip()
            for low, high, count in zip(edges, edges[1:], counts.tolist())]


def statistics(name: str, tokens: IndexedDataset, labels: IndexedDataset | None, bins: int) -> list[str]:
    """Lines about one stream and its labels."""
    sizes = np.asarray(tokens.sizes)
    if not len(sizes):
        return [f"{name}: empty"]
    total = int(sizes.sum(dtype=np.int64))
    marks = ", ".join(f"{quantile:.0%} up to {int(np.quantile(sizes, quantile)):,}" for quantile in QUANTILES)
    lines = [f"{name}: {len(sizes):,} documents, {total:,} tokens; length {sizes.min():,} to {sizes.max():,}, "
             f"mean {sizes.mean():.1f}, {marks}"]
    if labels is not None:
        learnt = sum(int(np.count_nonzero(labels.get(i) != IGNORED)) for i in range(len(labels)))
        lines.append(f"  {learnt:,} tokens are learnt ({learnt / max(total, 1):.1%})")
    return lines + histogram(sizes, bins)


def show(prefix: str, options: ShowOptions, color: bool) -> str:
    """The whole page.

    Raises:
        ConfigError: no such data, no tokenizer, or no such sample.
    """
    streams = find_streams(prefix)
    record: dict[str, Any] = read_sidecar(prefix) or {}
    folder = options.tokenizer_name_or_path or record.get("tokenizer", {}).get("path")
    if options.samples and folder is None:
        raise ConfigError(f"{prefix}: no {prefix}.json tells the tokenizer; give --tokenizer-name-or-path, or "
                          "--samples 0 for the statistics alone.")
    count = len(streams[0][1])
    if options.samples and not 0 <= options.first < count:
        raise ConfigError(f"--first {options.first}: {prefix} has the samples 0 to {count - 1}; choose one of them.")
    lines: list[str] = []
    if options.samples:
        tokenizer = load_tokenizer(folder)
        for i in range(options.first, min(options.first + options.samples, count)):
            for name, tokens, labels in streams:
                ids = tokens.get(i)
                learnt = np.zeros(len(ids), bool) if labels is None else labels.get(i) != IGNORED
                lines += [f"--- {name} {i}: {len(ids):,} tokens"
                          + ("" if labels is None else f", {int(learnt.sum()):,} learnt"),
                          marked_text(tokenizer, ids, learnt, color)]
    if record:
        lines.append(f"made by {record['handler']} with the template {record['template']['name']}, label policy "
                     f"{record['label_policy']} ({record['label_turns']} reply), tokenizer "
                     f"{record['tokenizer']['path']}")
    for name, tokens, labels in streams:
        lines += statistics(name, tokens, labels, options.bins)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The verb `modellink data`."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if words[:1] != ["show"]:
        raise ConfigError(f"modellink data: {f'unknown verb {words[0]}' if words else 'the verb is missing'}; {USAGE}.")
    prefix = words[1] if len(words) > 1 and not words[1].startswith("-") else None
    (options,), _ = parse_sections("modellink data show PREFIX", "Show token files.", (ShowOptions,),
                                   words[2:] if prefix else words[1:])
    if prefix is None:
        raise ConfigError(f"modellink data show: PREFIX is missing; {USAGE}.")
    if options.samples < 0 or options.bins < 1:
        raise ConfigError(f"--samples {options.samples} --bins {options.bins}: --samples must be 0 or more and --bins "
                          "1 or more.")
    color = options.color == "always" or (options.color == "auto" and sys.stdout.isatty()
                                          and "NO_COLOR" not in os.environ)
    print(show(prefix.removesuffix("_packed"), options, color), flush=True)
    return 0
