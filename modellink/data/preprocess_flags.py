"""Flags of tools/preprocess_data.py, and everything about them that can be checked before work starts."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from modellink.config.errors import ConfigError, ProblemList
from modellink.config.fields import flag
from modellink.config.files import near_path_hint
from modellink.data.handlers import HANDLERS, Handler, InstructionHandler, is_pairwise, make_handler
from modellink.data.handlers.records import parse_map_keys
from modellink.data.indexed import data_files
from modellink.data.inputs import CONCAT, STRATEGIES, Source, find_sources, parse_shares
from modellink.data.readers import FORMATS
from modellink.data.sidecar import sidecar_path
from modellink.data.templates import LABEL_POLICIES, resolve_name, template_help
from modellink.data.tokenizer import check_tokenizer_folder

TOKENIZER_TYPES = ("PretrainedFromHF", "BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer")
OVERLONG = ("drop", "truncate", "error")


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """Input"""

    input: list[str] | None = flag(None, "Text files, or folders whose most frequent format is read: "
                                   f"{', '.join(FORMATS)} (json, jsonl, csv and txt also with .gz); several also "
                                   "with commas between them.", nargs="+", metavar="PATH")
    json_keys: list[str] = flag(["text"], "Columns to take; each becomes PREFIX_<column>_document.", nargs="+",
                                metavar="COLUMN")
    handler_name: str = flag("GeneralPretrainHandler", f"What is done with a record: {', '.join(HANDLERS)}.",
                             metavar="NAME")
    map_keys: str | None = flag(None, "The file's names of a record's columns as a JSON object, as in "
                                """'{"prompt": "question", "response": "answer"}' or '{"messages": "chat", "tags": """
                                """{"role_tag": "role", "content_tag": "content"}}'.""", metavar="JSON")
    dataset_dir: str | None = flag(None, "Folder of the inputs; where it has a dataset_info.json, --input may name its "
                                   "data sets.", metavar="FOLDER")
    mix_strategy: str = flag(CONCAT, "How several inputs are mixed: one after the other, or interleaved until the "
                             "first ends (under) or until all have been seen whole (over).", choices=STRATEGIES)
    interleave_probs: list[str] | None = flag(None, "Share of each input in an interleaved order; without it they "
                                              "take turns.", nargs="+", metavar="SHARE")
    max_samples: int | None = flag(None, "Take so many records of each input at most.", type=int, metavar="N")
    seed: int = flag(1234, "Seed of an interleaved order.")
    merge_group_keys: list[str] | None = flag(
        None, "Merge finished files instead: for each key all PREFIX_KEY.bin and .idx in the --input folder, as in "
        "text_document or packed_input_ids_document.", nargs="+", metavar="KEY")
    split_sentences: bool = flag(False, "Refused: cuts documents into sentences for BERT-style training.")


@dataclasses.dataclass(frozen=True)
class InstructionOptions:
    """Instruction and preference data"""

    prompt_type: str | None = flag(None, f"Template: {template_help()}. Default: alpaca for GeneralInstructionHandler, "
                                   "qwen for all others.", metavar="NAME")
    label_policy: str = flag("assistant", "What is learnt: replies with their end token; also control tokens and line "
                             "ends as the first Qwen did; or everything.", choices=LABEL_POLICIES)
    label_turns: str = flag("every", "Which replies of a dialogue are learnt.", choices=("every", "last"))
    pack: bool = flag(False, "Refused: packing belongs to training.")


@dataclasses.dataclass(frozen=True)
class TokenizerOptions:
    """Tokenizer"""

    tokenizer_type: str = flag("PretrainedFromHF", "Kind of tokenizer; only PretrainedFromHF is read.",
                               choices=TOKENIZER_TYPES)
    tokenizer_name_or_path: str | None = flag(None, "Local Hugging Face folder of the tokenizer.", metavar="FOLDER")
    tokenizer_not_use_fast: bool = flag(False, "Ask transformers for the slow tokenizer where it has one.")
    append_eod: bool = flag(False, "End every document with <|endoftext|> (or the tokenizer's eos token).")
    split_special_tokens: bool = flag(False, "Encode the text of special tokens in pretraining text as text; dialogues "
                                      "are always encoded so.")
    seq_length: int | None = flag(None, "The most tokens of a document; without it there is no limit.",
                                  type=int, metavar="TOKENS")
    overlong: str = flag("drop", "What becomes of documents with more tokens than --seq-length.", choices=OVERLONG)


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Output"""

    output_prefix: str | None = flag(None, "Start of the output's path: PREFIX_text_document.bin and .idx.",
                                     metavar="PREFIX")
    overwrite: bool = flag(False, "Replace output that exists.")
    workers: int = flag(1, "Processes that tokenize.", metavar="N")
    n_subs: int = flag(1, "Shards that are tokenized at the same time, each by --workers processes, and merged in the "
                       "order of the input.", metavar="N")
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
    cache_dir: str | None = flag(None, "No effect: nothing is cached.")
    overwrite_cache: bool = flag(False, "No effect: nothing is cached.")


def former_notice(given: Iterable[str]) -> str | None:
    """One line about the flags without effect that were given."""
    reasons = {field.name: field.metadata["help"].removeprefix("No effect").strip(":, .")
               for field in dataclasses.fields(FormerOptions)}
    notes = [f"--{name.replace('_', '-')} ({reasons[name]})" for name in sorted(reasons.keys() & set(given))]
    return f"without effect: {', '.join(notes)}" if notes else None


@dataclasses.dataclass(frozen=True)
class Options:
    """All sections.

    Attributes:
        given: names of the flags on the command line.
    """

    source: InputOptions
    instruction: InstructionOptions
    words: TokenizerOptions
    output: OutputOptions
    given: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the flags and the disk say will be done.

    Attributes:
        sources: inputs.
        handler: what is done with a record.
        template: name of the template; None for text.
        shares: of the sources; None: in turn.
    """

    sources: list[Source]
    handler: Handler
    template: str | None
    shares: list[float] | None


def make_plan(options: Options) -> Plan:
    """Check everything that can be told from the flags and the disk, all problems at once.

    Raises:
        ConfigError: with every problem.
    """
    source, words, output = options.source, options.words, options.output
    problems = ProblemList()
    for name, value, what in (("--input", "".join(source.input or []), "the text to read"),
                              ("--tokenizer-name-or-path", words.tokenizer_name_or_path, "the tokenizer's folder"),
                              ("--output-prefix", output.output_prefix, "where the token files go")):
        if not value:
            problems.add(f"{name} is missing: give {what}.")
    for name, number in (("--workers", output.workers), ("--log-interval", output.log_interval),
                         ("--seq-length", words.seq_length), ("--n-subs", output.n_subs),
                         ("--max-samples", source.max_samples)):
        if number is not None and number < 1:
            problems.add(f"{name} {number}: must be 1 or more.")
    if "overlong" in options.given and words.seq_length is None:
        problems.add(f"--overlong {words.overlong}: nothing is too long without a limit; give --seq-length.")
    if source.split_sentences:
        problems.add("--split-sentences: GPT training reads whole documents and no sentence splitter is built in; "
                     "remove the flag.")
    if words.tokenizer_type != "PretrainedFromHF":
        problems.add(f"--tokenizer-type {words.tokenizer_type}: only PretrainedFromHF is read; give the model's "
                     "Hugging Face folder with --tokenizer-name-or-path.")
    repeated = sorted({key for key in source.json_keys if source.json_keys.count(key) > 1})
    if repeated:
        problems.add(f"--json-keys {' '.join(source.json_keys)}: {repeated[0]} is named twice; name each column once.")
    if options.instruction.pack:
        problems.add("--pack: packing belongs to training, which computes the bins from the finished files; remove the "
                     "flag here and give --pack to pretrain_gpt.py.")
    handler = cast(Handler | None, problems.catch(lambda: make_handler(
        source.handler_name, tuple(source.json_keys), parse_map_keys(source.map_keys))))
    sources: list[Source] | None = None
    if source.input:
        text_format = handler.text_format if handler else None
        sources = cast(list[Source] | None, problems.catch(lambda: find_sources(
            source.input or [], source.dataset_dir, text_format)))
    if words.tokenizer_name_or_path:
        problems.catch(lambda: check_tokenizer_folder(words.tokenizer_name_or_path or ""))
    template = shares = None
    if isinstance(handler, InstructionHandler):
        wanted = options.instruction.prompt_type or handler.template
        template = cast(str | None, problems.catch(lambda: resolve_name(wanted)))
        problems.catch(lambda: _check_sources(sources or [], source.handler_name))
    if handler is not None:
        problems.catch(functools.partial(_check_kind, handler, options))
        if output.output_prefix:
            problems.catch(functools.partial(check_output, output.output_prefix, handler.outputs, output.overwrite,
                                             isinstance(handler, InstructionHandler)))
    if sources is not None:
        shares = cast(list[float] | None, problems.catch(functools.partial(
            parse_shares, source.interleave_probs, len(sources), source.mix_strategy)))
    problems.raise_if_any()
    assert sources is not None and handler is not None
    if any(one.key_map for one in sources):
        base = parse_map_keys(source.map_keys)
        handler = make_handler(source.handler_name, (), base, [one.key_map or base for one in sources])
    return Plan(sources, handler, template, shares)


def _check_kind(handler: Handler, options: Options) -> None:
    """Flags that another kind of handler has no use for."""
    name, instruction = options.source.handler_name, options.instruction
    if not isinstance(handler, InstructionHandler):
        for field in ("prompt_type", "label_policy", "label_turns"):
            if field in options.given:
                given = f"--{field.replace('_', '-')} {getattr(instruction, field)}"
                raise ConfigError(f"{given}: {name} reads plain text, which has neither template nor labels; remove "
                                  "the flag or choose an instruction handler.")
    elif is_pairwise(handler) and instruction.label_policy != "assistant":
        raise ConfigError(f"--label-policy {instruction.label_policy}: preference pairs are compared by their last "
                          f"replies alone, so {name} labels nothing else; remove the flag.")
    if isinstance(handler, InstructionHandler) and "json_keys" in options.given:
        raise ConfigError(f"--json-keys {' '.join(options.source.json_keys)}: names the columns of plain text; name "
                          f"those of {name} with --map-keys.")


def _check_sources(sources: Sequence[Source], name: str) -> None:
    """What dataset_info.json says of the inputs must fit the handler."""
    for source in sources:
        if source.pairwise is None:
            continue
        if name != "LlamaFactoryInstructionHandler":
            raise ConfigError(f"--input {source.name}: it is an entry of dataset_info.json, whose names only "
                              f"LlamaFactoryInstructionHandler follows; choose it, or give {name} the file itself.")
        if source.pairwise:
            raise ConfigError(f"--input {source.name}: dataset_info.json says it holds preferences (ranking); give its "
                              "file to AlpacaStylePairwiseHandler or SharegptStylePairwiseHandler.")


def output_prefixes(prefix: str, outputs: Sequence[str]) -> list[str]:
    """PREFIX_<output>_document for every output."""
    return [f"{prefix}_{name}_document" for name in outputs]


def check_output(prefix: str, outputs: Sequence[str], overwrite: bool, sidecar: bool) -> None:
    """Raise a ConfigError when the output cannot go where it should."""
    if prefix.endswith(os.sep):
        raise ConfigError(f"--output-prefix {prefix}: this is a folder; add the first part of a file name, "
                          f"as in {prefix}data.")
    paths = [path for name in output_prefixes(prefix, outputs) for path in data_files(name)]
    for path in [*paths, *([sidecar_path(prefix)] if sidecar else [])]:
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
