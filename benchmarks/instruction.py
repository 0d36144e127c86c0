"""Tokens per second of preprocessing instructions against one dialogue at a time and against datasets.map.

    python benchmarks/instruction.py --input FILE.json ... --tokenizer FOLDER [--copies 10] [--json OUT]

Everyone reads the same Alpaca records and writes the same three streams, which is checked byte for byte:

- one at a time: `apply_chat_template(tokenize=True, return_assistant_tokens_mask=True)` for each record, then
  megatron-core's IndexedDatasetBuilder;
- datasets.map: what the original did: `load_dataset`, `map` of the same function over as many processes, then the
  builder;
- modellink: what tools/preprocess_data.py does after its checks, workers' start included.

CPU seconds are those of all processes together; unlike the clock they hardly depend on what else the machine does.
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flags import number, open_output

from modellink.config.errors import ConfigError, run_command
from modellink.config.parser import Parser
from modellink.data.chat_encode import IGNORED, ChatEncoder
from modellink.data.handlers.dialogues import AlpacaStyleInstructionHandler
from modellink.data.indexed import data_files
from modellink.data.preprocess import preprocess
from modellink.data.preprocess_flags import output_prefixes
from modellink.data.sample_encode import SampleEncoder
from modellink.data.templates import LabelPolicy, make_template
from modellink.data.tokenizer import load_tokenizer

STREAMS = AlpacaStyleInstructionHandler.outputs
TEMPLATE = (
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of doing it; the times are the best of the runs."""

    name: str
    workers: int
    seconds: float
    cpu_seconds: float
    tokens_per_s: float
    tokens_per_s_per_worker: float
    times_the_loop: float
    times_the_loop_per_cpu_second: float


def timed(runs: int, works: dict[str, Callable[[], int]]) -> dict[str, tuple[float, float]]:
    """Best (seconds, CPU seconds) of each; they take turns, so that a busy moment does not fall on one of them."""
    best = dict.fromkeys(works, (float("inf"), float("inf")))
    for _ in range(runs):
        for name, work in works.items():
            start, used = time.perf_counter(), sum(os.times()[:4])
            work()
            taken = time.perf_counter() - start, sum(os.times()[:4]) - used
            best[name] = min(best[name][0], taken[0]), min(best[name][1], taken[1])
    return best


def encode_one(record: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """The three streams of one record the transformers way."""
    asked = record["instruction"] + (f"\n{record['input']}" if record["input"] else "")
    done = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}],
        chat_template=TEMPLATE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids = done["input_ids"]
    return {"packed_input_ids": ids, "packed_attention_mask": [1] * len(ids),
            "packed_labels": [word if mask else IGNORED for word, mask in zip(ids, done["assistant_masks"])]}


def build(prefix: str, samples: Any) -> int:
    """Write samples with megatron-core's builder; returns the number of tokens."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    names = output_prefixes(prefix, STREAMS)
    builders = [IndexedDatasetBuilder(name + ".bin", dtype=np.int32) for name in names]
    tokens = 0
    for sample in samples:
        for builder, stream in zip(builders, STREAMS):
            builder.add_document(sample[stream], [len(sample[stream])])
        tokens += len(sample[STREAMS[0]])
    for builder, name in zip(builders, names):
        builder.finalize(name + ".idx")
    return tokens


def one_at_a_time(source: Path, prefix: str, tokenizer: Any) -> int:
    """The first peer."""
    with open(source, encoding="utf-8") as lines:
        return build(prefix, (encode_one(json.loads(line), tokenizer) for line in lines))


def datasets_map(source: Path, prefix: str, tokenizer: Any, workers: int, cache: Path) -> int:
    """The second peer, without a cache of an earlier run."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=folder)
        done = rows.map(encode_one, fn_kwargs={"tokenizer": tokenizer}, num_proc=workers,
                        remove_columns=rows.column_names)
        return build(prefix, done)


def ours(source: Path, prefix: str, encoder: SampleEncoder, workers: int) -> int:
    """tools/preprocess_data.py after its checks."""
    return preprocess([source], "jsonl", output_prefixes(prefix, STREAMS), encoder, workers, sys.maxsize)[0].tokens


def make_parser() -> Parser:
    parser = Parser(prog="instruction.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--input", nargs="+", required=True, help="lists of Alpaca records")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder with ChatML's tokens")
    parser.add_argument("--copies", type=number, default=10, help="how many times the records are repeated")
    parser.add_argument("--workers", type=number, nargs="+", default=[1, os.cpu_count() or 1],
                        help="numbers of processes to try")
    parser.add_argument("--runs", type=number, default=3, help="the best of so many runs is shown")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print."""
    options = make_parser().parse_args(argv)
    for path in options.input:
        if not Path(path).is_file():
            raise ConfigError(f"--input {path}: no such file; give a list of Alpaca records in JSON.")
    if options.json:
        open_output(options.json)
    records = [record for path in options.input for record in json.loads(Path(path).read_text(encoding="utf-8"))]
    tokenizer = load_tokenizer(options.tokenizer)
    chat = ChatEncoder(load_tokenizer(options.tokenizer), make_template("qwen", tokenizer), LabelPolicy())
    encoder = SampleEncoder(chat, AlpacaStyleInstructionHandler(), False, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source.jsonl"
        source.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records) * options.copies,
                          encoding="utf-8")
        works: dict[str, Any] = {"loop": functools.partial(one_at_a_time, source, str(folder / "loop"), tokenizer)}
        shown = {"loop": ("one at a time", 1)}
        for workers in dict.fromkeys(options.workers):
            works[f"map{workers}"] = functools.partial(datasets_map, source, str(folder / f"map{workers}"), tokenizer,
                                                       workers, folder)
            works[f"ours{workers}"] = functools.partial(ours, source, str(folder / f"ours{workers}"), encoder, workers)
            shown |= {f"map{workers}": ("datasets.map", workers), f"ours{workers}": ("modellink", workers)}
        tokens = works["loop"]()  # also fills caches before anything is timed
        best = timed(options.runs, works)
        loop = best["loop"]
        rows = [Row(*shown[key], seconds, cpu, tokens / seconds, tokens / seconds / shown[key][1], loop[0] / seconds,
                    loop[1] / cpu) for key, (seconds, cpu) in best.items()]
        for key in works:
            for mine, theirs in zip(*(output_prefixes(str(folder / which), STREAMS) for which in (key, "loop"))):
                for one, other in zip(data_files(mine), data_files(theirs)):
                    if one.read_bytes() != other.read_bytes():
                        raise SystemExit(f"{one.name} differs from {other.name}")
    print(f"{len(records) * options.copies:,} records, {tokens:,} tokens, {len(tokenizer):,} words, "
          f"{os.cpu_count()} cores, best of {options.runs}, all files equal")
    print(f"{'':14} {'workers':>7} {'seconds':>8} {'CPU s':>8} {'tokens/s':>12} {'per worker':>12} "
          f"{'x one at a time':>16} {'x per CPU s':>12}")
    for row in rows:
        print(f"{row.name:14} {row.workers:7} {row.seconds:8.2f} {row.cpu_seconds:8.2f} {row.tokens_per_s:12,.0f} "
              f"{row.tokens_per_s_per_worker:12,.0f} {row.times_the_loop:16.2f} "
              f"{row.times_the_loop_per_cpu_second:12.2f}")
    if options.json:
        options.json.write_text(json.dumps({"records": len(records) * options.copies, "tokens": tokens,
                                            "rows": [dataclasses.asdict(row) for row in rows]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
