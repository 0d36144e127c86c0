"""From text files to the token files that training reads."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from modellink.config.errors import ConfigError, ProblemList
from modellink.config.fields import flag
from modellink.config.files import near_path_hint
from modellink.config.parser import parse_sections
from modellink.data.encode import Encoded, Encoder, encode_in_workers
from modellink.data.handlers import HANDLERS, make_handler
from modellink.data.indexed import IndexedWriter, data_files
from modellink.data.readers import READERS, find_files, read_batches
from modellink.data.tokenizer import check_tokenizer_folder, load_tokenizer

PROG = "preprocess_data.py"
TOKENIZER_TYPES = ("PretrainedFromHF", "BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer")


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """Input"""

    input: str | None = flag(None, "A text file, or a folder whose most frequent format is read: "
                             f"{', '.join(READERS)} (json, jsonl, csv and txt also with .gz).", metavar="PATH")
    json_keys: list[str] = flag(["text"], "Columns to take; each becomes PREFIX_<column>_document.", nargs="+",
                                metavar="COLUMN")
    handler_name: str = flag("GeneralPretrainHandler", f"What is done with a record: {', '.join(HANDLERS)}.",
                             metavar="NAME")
    split_sentences: bool = flag(False, "Refused: cuts documents into sentences for BERT-style training.")


@dataclasses.dataclass(frozen=True)
class TokenizerOptions:
    """Tokenizer"""

    tokenizer_type: str = flag("PretrainedFromHF", "Kind of tokenizer; only PretrainedFromHF is read.",
                               choices=TOKENIZER_TYPES)
    tokenizer_name_or_path: str | None = flag(None, "Local Hugging Face folder of the tokenizer.", metavar="FOLDER")
    tokenizer_not_use_fast: bool = flag(False, "Ask transformers for the slow tokenizer where it has one.")
    append_eod: bool = flag(False, "End every document with <|endoftext|> (or the tokenizer's eos token).")
    seq_length: int | None = flag(None, "Drop documents with more tokens than this; without it none is dropped.",
                                  type=int, metavar="TOKENS")


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Output"""

    output_prefix: str | None = flag(None, "Start of the output's path: PREFIX_text_document.bin and .idx.",
                                     metavar="PREFIX")
    overwrite: bool = flag(False, "Replace output that exists.")
    workers: int = flag(1, "Processes that tokenize.", metavar="N")
    log_interval: int = flag(1000, "Documents between two progress lines where there is no terminal.", metavar="N")


@dataclasses.dataclass(frozen=True)
class FormerOptions:
    """Accepted from older scripts, without effect"""

    vocab_file: str | None = flag(None, "No effect: the vocabulary is read from the tokenizer's folder.")
    merge_file: str | None = flag(None, "No effect: the merges are read from the tokenizer's folder.")
    make_vocab_size_divisible_by: int = flag(128, "No effect: the model decides the rows of its vocabulary.")
    pad_vocab_size_to: int | None = flag(None, "No effect: the model decides the rows of its vocabulary.", type=int)
    dataset_impl: str = flag("mmap", "No effect: output is always memory-mapped.", choices=("lazy", "cached", "mmap"))
    keep_newlines: bool = flag(False, "No effect: newlines are always kept.")
    streaming: bool = flag(False, "No effect: input is always streamed.")
    hf_datasets_params: str | None = flag(None, "No effect: the files are read directly and whole.")
    datasets: str | None = flag(None, "No effect, as before.")


def former_notice(given: Iterable[str]) -> str | None:
    """One line about the flags without effect that were given."""
    reasons = {field.name: field.metadata["help"].removeprefix("No effect").strip(":, .")
               for field in dataclasses.fields(FormerOptions)}
    notes = [f"--{name.replace('_', '-')} ({reasons[name]})" for name in sorted(reasons.keys() & set(given))]
    return f"without effect: {', '.join(notes)}" if notes else None


@dataclasses.dataclass
class Totals:
    """Counts of one output."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    dropped: int = 0

    def add(self, encoded: Encoded) -> None:
        self.documents += len(encoded.lengths)
        self.tokens += encoded.tokens.size
        self.empty += encoded.empty
        self.dropped += encoded.dropped


def _check_options(source: InputOptions, words: TokenizerOptions, output: OutputOptions) -> None:
    """Everything that can be told from the flags and the disk, all problems at once."""
    problems = ProblemList()
    for name, value, what in (("--input", source.input, "the text to read"),
                              ("--tokenizer-name-or-path", words.tokenizer_name_or_path, "the tokenizer's folder"),
                              ("--output-prefix", output.output_prefix, "where the token files go")):
        if not value:
            problems.add(f"{name} is missing: give {what}.")
    for name, number in (("--workers", output.workers), ("--log-interval", output.log_interval),
                         ("--seq-length", words.seq_length)):
        if number is not None and number < 1:
            problems.add(f"{name} {number}: must be 1 or more.")
    if source.split_sentences:
        problems.add("--split-sentences: GPT training reads whole documents and no sentence splitter is built in; "
                     "remove the flag.")
    if words.tokenizer_type != "PretrainedFromHF":
        problems.add(f"--tokenizer-type {words.tokenizer_type}: only PretrainedFromHF is read; give the model's "
                     "Hugging Face folder with --tokenizer-name-or-path.")
    repeated = sorted({key for key in source.json_keys if source.json_keys.count(key) > 1})
    if repeated:
        problems.add(f"--json-keys {' '.join(source.json_keys)}: {repeated[0]} is named twice; name each column once.")
    problems.catch(lambda: make_handler(source.handler_name, tuple(source.json_keys)))
    if source.input:
        problems.catch(lambda: find_files(Path(source.input or "")))
    if words.tokenizer_name_or_path:
        problems.catch(lambda: check_tokenizer_folder(words.tokenizer_name_or_path or ""))
    if output.output_prefix:
        problems.catch(lambda: _check_output(output.output_prefix or "", source.json_keys, output.overwrite))
    problems.raise_if_any()


def output_prefixes(prefix: str, outputs: Sequence[str]) -> list[str]:
    """PREFIX_<output>_document for every output."""
    return [f"{prefix}_{name}_document" for name in outputs]


def _check_output(prefix: str, outputs: Sequence[str], overwrite: bool) -> None:
    if prefix.endswith(os.sep):
        raise ConfigError(f"--output-prefix {prefix}: this is a folder; add the first part of a file name, "
                          f"as in {prefix}data.")
    for name in output_prefixes(prefix, outputs):
        for path in data_files(name):
            if path.is_dir():
                raise ConfigError(f"{path}: a folder has the name of an output file; choose another --output-prefix.")
            if path.exists() and not overwrite:
                raise ConfigError(f"{path}: the output exists already; give --overwrite to replace it or choose "
                                  "another --output-prefix.")
    parent = Path(prefix).parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(f"--output-prefix {prefix}: {parent} is a file, not a folder; choose another place.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--output-prefix {prefix}: the folder {parent} cannot be written; choose another place"
                          f"{near_path_hint(parent)}.")


@contextlib.contextmanager
def _new_folders(folder: Path) -> Iterator[None]:
    """Make `folder`; when the block fails, remove again what was made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # someone else's file lies in it by now
                path.rmdir()
        raise


class _Progress:
    """A bar on a terminal, otherwise a line every `interval` documents."""

    def __init__(self, interval: int):
        self.interval = interval
        self.bar = tqdm(unit=" documents", unit_scale=True, disable=None, desc="tokenizing")
        self.start = time.perf_counter()
        self.rows = 0

    def update(self, rows: int, tokens: int) -> None:
        """`rows` more were done, `tokens` tokens are written in all."""
        before, self.rows = self.rows, self.rows + rows
        rate = tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.bar.update(rows)
        if self.bar.disable and self.rows // self.interval > before // self.interval:
            print(f"processed {self.rows:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s", flush=True)


def preprocess(files: Sequence[Path], kind: str, prefixes: Sequence[str], encoder: Encoder, workers: int,
               log_interval: int) -> list[Totals]:
    """Tokenize `files` into one pair of token files per output; the files appear only when all is done.

    Args:
        files, kind: from `readers.find_files`.
        prefixes: one per output of the encoder's handler.
        encoder: what the workers run.
        workers: processes.
        log_interval: documents between progress lines.

    Raises:
        ConfigError: input that cannot be read, or a disk that cannot be written.
    """
    totals = [Totals() for _ in prefixes]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_new_folders(Path(prefixes[0]).parent))
        writers = [stack.enter_context(IndexedWriter(prefix)) for prefix in prefixes]
        results = encode_in_workers(read_batches(files, kind, encoder.handler.keys), encoder, workers)
        stack.enter_context(contextlib.closing(results))
        progress = _Progress(log_interval)
        stack.enter_context(progress.bar)
        for batch, outputs in results:
            for writer, total, encoded in zip(writers, totals, outputs):
                writer.append(encoded.tokens, encoded.lengths)
                total.add(encoded)
            progress.update(len(batch.rows), sum(total.tokens for total in totals))
        for prefix, total in zip(prefixes, totals):
            if not total.documents:
                raise ConfigError(f"{files[0]}: nothing to write to {prefix}: {total.empty} documents are empty and "
                                  f"{total.dropped} longer than --seq-length; check the input and the flags.")
    return totals


def summary(prefix: str, totals: Totals, seconds: float, workers: int) -> str:
    """The closing lines about one output."""
    rate = totals.tokens / seconds
    return (f"{prefix}.bin and .idx written: {totals.documents:,} documents, {totals.tokens:,} tokens, "
            f"{totals.empty:,} empty left out, {totals.dropped:,} longer than --seq-length dropped, "
            f"{seconds:.1f} s, {rate:,.0f} tokens/s ({rate / workers:,.0f} per worker, {workers} workers)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command `tools/preprocess_data.py`."""
    (source, words, output, _), given = parse_sections(
        PROG, "Tokenize text files for training: PREFIX_<column>_document.bin and .idx.",
        (InputOptions, TokenizerOptions, OutputOptions, FormerOptions), argv)
    _check_options(source, words, output)
    notice = former_notice(given)
    if notice:
        print(notice, file=sys.stderr, flush=True)
    files, kind, left_out = find_files(Path(source.input))
    if left_out:
        print(f"reading {len(files)} {kind} files of {source.input}, leaving out {', '.join(left_out[:5])}"
              f"{' and more' if len(left_out) > 5 else ''}", file=sys.stderr, flush=True)
    handler = make_handler(source.handler_name, tuple(source.json_keys))
    tokenizer = load_tokenizer(words.tokenizer_name_or_path, use_fast=not words.tokenizer_not_use_fast)
    encoder = Encoder(tokenizer, handler, words.append_eod, words.seq_length)
    prefixes = output_prefixes(output.output_prefix, handler.outputs)
    start = time.perf_counter()
    totals = preprocess(files, kind, prefixes, encoder, output.workers, output.log_interval)
    seconds = time.perf_counter() - start
    for prefix, total in zip(prefixes, totals):
        print(summary(prefix, total, seconds, output.workers), flush=True)
    return 0
