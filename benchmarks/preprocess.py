"""Tokens per second of preprocessing against a plain loop, in one run.

    python benchmarks/preprocess.py [--input FILE.txt|FILE.jsonl] [--tokenizer FOLDER] [--megabytes 24] [--json OUT]

The plain loop is `tokenizer(text)["input_ids"]` for one document after the other, into megatron-core's
IndexedDatasetBuilder. Both read the same JSON lines and write the same bytes, which is checked.
"""

import dataclasses
import functools
import json
import os
import pydoc_data.topics
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flags import number, open_output

from modellink.config.errors import run_command
from modellink.config.parser import Parser
from modellink.data.encode import Encoder
from modellink.data.handlers import GeneralPretrainHandler
from modellink.data.indexed import data_files
from modellink.data.preprocess import preprocess
from modellink.data.readers import find_files, read_batches
from modellink.data.tokenizer import load_tokenizer
from modellink.data.train_tokenizer import train_tokenizer


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of doing it."""

    name: str
    workers: int
    seconds: float
    tokens_per_s: float
    tokens_per_s_per_worker: float
    times_the_loop: float


def source_texts(path: str | None) -> list[str]:
    """Documents of a file, or the paragraphs of Python's reference topics."""
    if path is None:
        return [part for _, topic in sorted(pydoc_data.topics.topics.items())
                for part in re.split(r"\n\s*\n", topic) if part.strip()]
    files, kind, _ = find_files(Path(path))
    handler = GeneralPretrainHandler(("text",))
    return [text for batch in read_batches(files, kind, ("text",)) for text in handler.texts(batch)[0] if text.strip()]


def plain_loop(tokenizer: Any, source: Path, prefix: str) -> int:
    """The peer; returns the number of tokens."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    tokens = 0
    with open(source, encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"])["input_ids"]
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
    builder.finalize(prefix + ".idx")
    return tokens


def run_ours(source: Path, prefix: str, encoder: Encoder, workers: int) -> int:
    """What tools/preprocess_data.py does after its checks, workers' start included; returns the number of tokens."""
    return preprocess([source], "jsonl", [prefix], encoder, workers, sys.maxsize)[0].tokens


def timed(runs: int, works: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Best seconds of each; they take turns, so that a busy moment of the machine does not fall on one of them."""
    seconds = dict.fromkeys(works, float("inf"))
    for _ in range(runs):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def make_parser() -> Parser:
    parser = Parser(prog="preprocess.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--input", help="file with documents (default: Python's reference topics)")
    parser.add_argument("--tokenizer", help="tokenizer folder (default: 8000 words trained on the documents)")
    parser.add_argument("--megabytes", type=float, default=24.0, help="size of the input, by repeating the documents")
    parser.add_argument("--workers", type=number, nargs="+", default=[1, os.cpu_count() or 1],
                        help="numbers of processes to try")
    parser.add_argument("--runs", type=number, default=3, help="the best of so many runs is shown")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print."""
    options = make_parser().parse_args(argv)
    if options.json:
        open_output(options.json)

    texts = source_texts(options.input)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        if options.tokenizer is None:
            train_tokenizer(texts, 8000, folder / "tokenizer")
        tokenizer = load_tokenizer(options.tokenizer or folder / "tokenizer")
        source = folder / "source.jsonl"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        repeats = max(1, round(options.megabytes * 1e6 / len(lines)))
        source.write_text(lines * repeats, encoding="utf-8")

        encoder = Encoder(tokenizer, GeneralPretrainHandler(("text",)), False, None)
        loop = functools.partial(plain_loop, tokenizer, source, str(folder / "loop"))
        tokens = loop()  # also fills caches before anything is timed
        ours = {f"ours{workers}": workers for workers in options.workers}
        seconds = timed(options.runs, {"loop": loop, **{
            name: functools.partial(run_ours, source, str(folder / name), encoder, workers)
            for name, workers in ours.items()}})
        rows = [Row("plain loop", 1, seconds["loop"], tokens / seconds["loop"], tokens / seconds["loop"], 1.0)]
        for name, workers in ours.items():
            for mine, theirs in zip(data_files(folder / name), data_files(folder / "loop")):
                if mine.read_bytes() != theirs.read_bytes():
                    raise SystemExit(f"{mine.name} differs from the plain loop's")
            rate = tokens / seconds[name]
            rows.append(Row("preprocess_data.py", workers, seconds[name], rate, rate / workers,
                            rate / rows[0].tokens_per_s))

    print(f"{len(texts) * repeats:,} documents, {tokens:,} tokens, {source_size(lines, repeats):.1f} MB, "
          f"{len(tokenizer):,} words, {os.cpu_count()} cores, best of {options.runs}")
    print(f"{'':20} {'workers':>7} {'seconds':>8} {'tokens/s':>12} {'per worker':>12} {'x loop':>7}")
    for row in rows:
        print(f"{row.name:20} {row.workers:7} {row.seconds:8.2f} {row.tokens_per_s:12,.0f} "
              f"{row.tokens_per_s_per_worker:12,.0f} {row.times_the_loop:7.2f}")
    if options.json:
        options.json.write_text(json.dumps({"documents": len(texts) * repeats, "tokens": tokens,
                                            "rows": [dataclasses.asdict(row) for row in rows]}, indent=2) + "\n")
    return 0


def source_size(lines: str, repeats: int) -> float:
    """Megabytes of the input."""
    return len(lines) * repeats / 1e6


if __name__ == "__main__":
    sys.exit(run_command(main))
