"""Real tokens per second of tuning on Alpaca's lengths: padded, padded to the step's longest sample, and packed.

    python benchmarks/tuning.py [--input alpaca.parquet|.json] [--seq-length 512] [--output FILE]

The records go through tools/preprocess_data.py's own code; each way of making rows then trains in a process of its own,
in turn, with the same number of rows a step. Real tokens are those of samples, without padding. Without a file of
Alpaca records, samples whose lengths are spread like Alpaca's are drawn, which is said.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flags import add_output, number, open_output
from shapes import TRAINING
from sides import peak_memory, run_side

from modellink.config.errors import ConfigError, run_command
from modellink.config.parser import Parser

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

RECORDS = 2000  # of the file's first ones: more than a few steps read
WORDS = 8000
MODES = {"padded": [], "variable": ["--variable-seq-lengths"], "packed": ["--pack"]}


def alpaca_records(path: Path) -> list[dict[str, str]]:
    """The first records of a JSON or parquet file of Alpaca's form."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[dict[str, str]] = pyarrow.parquet.read_table(path).slice(0, RECORDS).to_pylist()
    else:
        rows = json.loads(path.read_text(encoding="utf-8"))[:RECORDS]
    return [{name: row[name] for name in ("instruction", "input", "output")} for row in rows]


def drawn_records(count: int) -> list[dict[str, str]]:
    """Records of Python's own documentation words, whose lengths are spread as Alpaca's (log-normal, mean near 60)."""
    import pydoc_data.topics

    import numpy as np

    words = " ".join(pydoc_data.topics.topics.values()).split()
    draw = np.random.default_rng(5)
    records = []
    for _ in range(count):
        sizes = np.minimum(draw.lognormal([2.3, 3.4], [0.5, 1.0]), 400).astype(int) + 1
        starts = draw.integers(0, len(words) - 401, 2)
        asked, answered = (" ".join(words[start:start + size]) for start, size in zip(starts, sizes))
        records.append({"instruction": asked, "input": "", "output": answered})
    return records


def prepare(folder: Path, source: Path | None, seq_length: int) -> None:
    """Write tokenizer, data streams and a model's config.json."""
    from modellink.data.preprocess import main as preprocess
    from modellink.data.train_tokenizer import train_tokenizer

    records = alpaca_records(source) if source else drawn_records(RECORDS)
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    train_tokenizer([text for record in records for text in record.values()], WORDS, folder / "hf")
    code = preprocess(["--input", str(folder / "records.json"), "--handler-name", "AlpacaStyleInstructionHandler",
                       "--tokenizer-name-or-path", str(folder / "hf"), "--seq-length", str(seq_length),
                       "--output-prefix", str(folder / "data")])
    assert code == 0
    (folder / "hf" / "config.json").write_text(json.dumps(TRAINING | {"vocab_size": WORDS}))


def run_mode(options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps one way."""
    from modellink.config.settings import parse_settings
    from modellink.runtime import prepare_run
    from modellink.start import start

    folder = Path(options.folder)
    run = prepare_run(parse_settings("bench", "", [
        "--model", str(folder / "hf"), "--data-path", str(folder / "data"), "--is-instruction-dataset", "--split",
        "100,0,0", "--seq-length", str(options.seq_length), "--train-iters", str(options.steps), "--lr", "1e-4",
        "--micro-batch-size", str(options.micro_batch), "--global-batch-size", str(options.batch), "--fp32",
        "--eval-iters", "0", "--device", "cpu", *MODES[options.mode]]), 1, "train")
    device = start(run)
    from modellink.training.loop import Trainer, build_state, load_data

    trainer = Trainer(build_state(run, device))
    rows = load_data(run)[0]
    reader = trainer.reader(rows)
    real = spent = samples = 0.0
    for step in range(options.steps):
        begin = time.perf_counter()
        trainer.step(reader, [0, 0])
        seconds = time.perf_counter() - begin
        if step < options.warmup:
            continue
        spent += seconds
        for index in range(step * options.batch, (step + 1) * options.batch):
            row = rows[index]
            found = row if isinstance(row, list) else [row]
            samples += len(found)
            real += sum(len(sample["tokens"]) for sample in found)
    counted = options.steps - options.warmup
    return {"real_tokens_per_second": real / spent, "samples_per_second": samples / spent,
            "real_tokens_per_row": real / (counted * options.batch), "seconds_per_step": spent / counted,
            "peak_bytes": peak_memory()}


def measure(mode: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one way in its own process and return its numbers."""
    command = [sys.executable, str(Path(__file__)), "--mode", mode, "--folder", str(folder)]
    for name in ("steps", "warmup", "batch", "micro_batch", "seq_length"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return run_side(command)


def make_parser() -> Parser:
    parser = Parser(prog="tuning.py", description="Packed against padded tuning on Alpaca's lengths, in one run.")
    parser.add_argument("--input", type=Path, help="Alpaca records, JSON or parquet (default: drawn)")
    parser.add_argument("--steps", type=number, default=5, help="steps of a way of making rows")
    parser.add_argument("--warmup", type=number, default=1, help="steps left out")
    parser.add_argument("--batch", type=number, default=8, help="rows a step")
    parser.add_argument("--micro-batch", type=number, default=4, help="rows of one forward pass")
    parser.add_argument("--seq-length", type=number, default=512, help="tokens of a row")
    parser.add_argument("--rounds", type=number, default=2, help="turns of each way; the best counts")
    add_output(parser, "tuning.json")
    parser.add_argument("--mode", choices=list(MODES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print."""
    options = make_parser().parse_args(argv)
    if options.mode:
        print(json.dumps(run_mode(options)), flush=True)
        return 0
    if options.warmup >= options.steps:
        raise ConfigError(f"--steps {options.steps}: no step is left after --warmup {options.warmup}; give more steps.")
    if options.input and not options.input.is_file():
        raise ConfigError(f"--input {options.input}: no such file; give Alpaca records, JSON or parquet.")
    open_output(options.output)
    source = options.input
    print(f"records: {source or 'drawn, with lengths like those of Alpaca'}", flush=True)
    turns: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), source, options.seq_length)
        for _ in range(options.rounds):
            for mode, found in turns.items():
                found.append(measure(mode, Path(name), options))
    best = {mode: max(found, key=lambda record: record["real_tokens_per_second"]) for mode, found in turns.items()}
    for mode, record in best.items():
        record["times_padded"] = record["real_tokens_per_second"] / best["padded"]["real_tokens_per_second"]
        record["times_padded_memory"] = record["peak_bytes"] / best["padded"]["peak_bytes"]
        print(f"{mode:9} {record['real_tokens_per_second']:7.0f} real tokens/s  {record['samples_per_second']:6.1f} "
              f"samples/s  {record['real_tokens_per_row']:5.0f} of {options.seq_length} positions real  "
              f"{record['times_padded']:.2f}x tokens/s, {record['times_padded_memory']:.2f}x peak memory of padded")
    options.output.write_text(json.dumps({"records": str(source or "drawn"), **best}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
