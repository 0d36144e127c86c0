"""Acceptance of an accelerator: `python tools/npu_acceptance.py`, on the machine that has it.

Compares operators with the formulas in fp64, tries collectives, trains a small model in several layouts and generates
with it beside the CPU, and measures memory and speed of a preset. Writes OUT/acceptance.json after every part and
prints a table; exit code 1 when a row is not within its limit (FAIL) or something broke (FAILED). Every part runs in
processes of its own: what ends one of them, an exception or a signal, is a row with its exception, traceback and log,
and the others still run.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# an operator without a kernel on the NPU is an error here, and not slow
os.environ.setdefault("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
# the log of a process that a signal ends names the place
os.environ.setdefault("PYTHONFAULTHANDLER", "1")

from npu_acceptance_rows import Failure, Row, RunFailed  # noqa: E402

from modellink.config.errors import run_command  # noqa: E402
from modellink.config.fields import flag  # noqa: E402
from modellink.config.files import write_beside  # noqa: E402
from modellink.config.parser import parse_sections  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
TITLE = "Compare an accelerator with the CPU and measure it."
# at least this; in half precision this many times the distance that the CPU's own roundings make
CURVE_LIMIT, ROUNDINGS = 1e-3, 4.0
# peak memory against the plan; smaller runs are ruled by buffers of fixed size, and are only reported
MEMORY_LIMIT, MEMORY_JUDGED_GIB = 0.3, 1.0
SMALL: dict[str, Any] = {"vocab_size": 1003, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
PRECISIONS: dict[str, list[str]] = {"fp32": ["--fp32"], "bf16": ["--bf16"],
                                    # no step is left out at this scale
                                    "fp16": ["--fp16", "--initial-loss-scale", "256"]}
TP2SP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
# curves: precision, ranks, flags; the first ones are also run on the CPU
CURVES: dict[str, tuple[str, int, list[str]]] = {
    **{precision: (precision, 1, []) for precision in PRECISIONS},
    "bf16-tp2-sp": ("bf16", 2, TP2SP),
    "bf16-tp2-sp-mc2": ("bf16", 2, [*TP2SP, "--use-mc2"]),
    "bf16-pp2": ("bf16", 2, ["--pipeline-model-parallel-size", "2"]),
    "bf16-dp2": ("bf16", 2, ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]),
}
WHOLE, REST = "the whole part", "the rest of the part"
# what the launcher says of a failed job
FIRST_RANK = re.compile(r"^rank \d+ failed first \((.*)\); the end of (.*):$", re.MULTILINE)
# variables that change what an NPU does, for the report
SETTINGS = ("ASCEND_", "HCCL_", "PYTORCH_NPU_", "PYTORCH_ALLOC", "TASK_QUEUE_", "TORCH_NPU_", "CUDA_", "NCCL_", "OMP_")


@dataclass(frozen=True)
class Options:
    """Acceptance."""

    device: str = flag("npu", "device to look at", choices=["npu", "cuda", "cpu"])
    out: str = flag("acceptance", "folder of acceptance.json and of the runs' logs")
    ranks: int | None = flag(None, "ranks of the collectives (default: all accelerators of this machine)", type=int)
    megabytes: int = flag(64, "size of the tensor whose collectives are timed")
    model: str = flag("qwen15-0.5b", "preset or folder whose memory and speed are measured")
    seq_length: int = flag(4096, "its sequence length")
    steps: int = flag(20, "training steps of every run")
    curves: list[str] | None = flag(None, "the loss curves to run (default: all that the ranks allow)", nargs="+",
                                    choices=list(CURVES))
    runner: str | None = flag(None, "a script that starts every process; tests/npu/simulate.py for the simulated NPU")
    part: str = flag("all", "one part only",
                      choices=["all", "operators", "collectives", "curve", "generation", "speed"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, write the report, print the table; 0, 1 when a row failed, 2 for a wrong flag."""
    (options,), _ = parse_sections("npu_acceptance.py", TITLE, (Options,), argv)
    out = Path(options.out)
    from modellink.device.select import select_device
    from modellink.device.starting import reporting_device

    device = select_device(options.device)
    with reporting_device(device.name):
        product = device.product_name()
    out.mkdir(parents=True, exist_ok=True)
    ranks = options.ranks if options.ranks is not None else device.count()
    head = {"device": device.name, "product": product, "libraries": device.libraries(),
            "simulated": options.runner is not None, "host": platform.platform(), "ranks": ranks,
            "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
            "options": asdict(options)}
    rows: list[Row] = []
    for part, find in PARTS.items():
        if options.part in ("all", part):
            rows += rows_of(part, find, options, ranks)
            report = {**head, "rows": [{**asdict(row), "verdict": row.verdict} for row in rows]}
            with write_beside(out / "acceptance.json") as path:
                path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(rows, f"{head['product']}{' (simulated)' if options.runner else ''}")
    return int(any(row.verdict in ("FAIL", "FAILED") for row in rows))


def rows_of(part: str, find: "Part", options: Options, ranks: int) -> list[Row]:
    """The rows of a part, which is worked out in another process; its failure is a row."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        job = pool.submit(find, options, ranks)
        error = job.exception()
    rows = [Row.broken(part, WHOLE, Failure.of(error))] if error is not None else job.result()
    for row in rows:
        if row.failure is not None:
            print(f"{row.part} {row.case}\n{row.failure.traceback or row.failure.message}", file=sys.stderr, flush=True)
    return rows


def show(rows: list[Row], title: str) -> None:
    width = max(len(row.case) for row in rows)
    print(f"{title}\n{'part':<13}{'case':<{width}}{'value':>12}  {'unit':<15}{'limit':>9}  verdict")
    for row in rows:
        value = "n/a" if row.value is None else f"{row.value:.4g}"
        limit = "" if row.limit is None else f"{row.limit:.3g}"
        print(f"{row.part:<13}{row.case:<{width}}{value:>12}  {row.unit:<15}{limit:>9}  {row.verdict}")


def run(options: Options, name: str, words: list[str], ranks: int = 1, *, is_reference: bool = False) -> None:
    """Run a script in processes of its own; its output goes to OUT/NAME.log, with several ranks also to OUT/NAME.ranks.

    Args:
        is_reference: it computes on this machine's CPU what the device is compared with, and needs no `--runner`.

    Raises:
        RunFailed: it did not end with exit code 0.
    """
    out = Path(options.out).absolute()
    log = out / f"{name}.log"
    launcher = ["-m", "modellink.cli", "launch", "--nproc-per-node", str(ranks),
                "--log-dir", str(out / f"{name}.ranks")] if ranks > 1 else []
    runner = [options.runner] if options.runner and not is_reference else []
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, *launcher, *runner, *words], cwd=REPO, stdout=file,
                              stderr=subprocess.STDOUT).returncode
    if code != 0:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        for found in FIRST_RANK.finditer(log.read_text(encoding="utf-8", errors="replace")):
            how, log = found[1], Path(found[2])
        raise RunFailed(Failure.of_process(how, log))


def own_worker(options: Options, part: str, ranks: int) -> list[Row]:
    """The rows of a part that needs the device in its own process, one for each rank."""
    out = Path(options.out).absolute()
    file = out / f"{part}.jsonl"
    file.unlink(missing_ok=True)
    broken: list[Failure] = []
    try:
        run(options, part, [str(Path(__file__).with_name("npu_acceptance_worker.py")), "--part", part, "--file",
                            str(file), "--device", options.device, "--megabytes", str(options.megabytes)], ranks)
    except RunFailed as error:  # rows that were written before it stay
        if not file.exists():
            raise
        broken = [error.failure]
    rows = [Row.from_json(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    return rows + [Row.broken(part, REST if rows else WHOLE, failure) for failure in broken]


def operator_rows(options: Options, ranks: int) -> list[Row]:
    """Operators against formulas, on one device."""
    return own_worker(options, "operators", 1)


def collective_rows(options: Options, ranks: int) -> list[Row]:
    """Collectives and products beside them, on all ranks."""
    if ranks == 1:
        return [Row("collectives", "left out: one rank has nobody to talk to", None, "")]
    return own_worker(options, "collectives", ranks)


def train(options: Options, name: str, device: str, words: list[str], ranks: int = 1, *,
          is_reference: bool = False) -> list[dict[str, Any]]:
    """The metrics of every step of a run.

    Raises:
        RunFailed: it failed, or took fewer steps than it should.
    """
    metrics = (Path(options.out) / f"{name}.jsonl").absolute()
    metrics.unlink(missing_ok=True)
    run(options, name, ["pretrain_gpt.py", "--mock-data", "--train-iters", str(options.steps), "--eval-iters", "0",
                        "--device", device, "--metrics-file", str(metrics), *words], ranks, is_reference=is_reference)
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    if len(steps) != options.steps:
        raise RunFailed(Failure("exit code 0", f"after {len(steps)} of {options.steps} steps",
                                log=str(Path(options.out).absolute() / f"{name}.log")))
    return steps


def curve_rows(options: Options, ranks: int) -> list[Row]:
    """The losses of a small model from the same weights, on the device and on the CPU, by precision and layout."""
    asked = {name: CURVES[name] for name in options.curves or CURVES if CURVES[name][1] <= ranks}
    rows = [Row("curve", f"{name}: left out, it needs {CURVES[name][1]} devices", None, "")
            for name in options.curves or CURVES if name not in asked]
    if not asked:
        return rows
    folder = small_model(options)

    def losses(name: str, flags: list[str], ranks: int = 1, *, is_reference: bool = False) -> list[float]:
        device = "cpu" if is_reference else options.device
        words = ["--load", str(folder), "--finetune", "--seq-length", "128", "--micro-batch-size", "2",
                 "--global-batch-size", "4", "--lr", "1e-3", *flags]
        label = f"curve-{name}-{'reference' if is_reference else device}"
        return [record["loss"] for record in train(options, label, device, words, ranks, is_reference=is_reference)]

    precisions = ["fp32", *sorted({precision for precision, _, _ in asked.values()} - {"fp32"})]
    expected = {precision: losses(precision, PRECISIONS[precision], is_reference=True) for precision in precisions}
    for name, (precision, count, flags) in asked.items():
        # roundings move the CPU's own curve by so much, and may move the device's by as much in another direction
        limit = max(CURVE_LIMIT, ROUNDINGS * largest(expected["fp32"], expected[precision]))
        try:
            found = losses(name, [*PRECISIONS[precision], *flags], count)
            rows.append(Row("curve", f"{options.steps} losses against the CPU, {name}",
                            largest(expected[precision], found), "difference", limit))
        except RunFailed as error:
            rows.append(Row.broken("curve", name, error.failure))
    return rows


def generation_rows(options: Options, ranks: int) -> list[Row]:
    """Logits of given words and greedy answers of the small model, on one device and on the CPU, by precision."""
    from modellink.data.train_tokenizer import train_tokenizer

    folder = small_model(options)
    train_tokenizer([TITLE], 300, folder)  # generation does not start without one; here it gets numbers of words
    expected, _ = generated(options, folder, is_reference=True)
    found, broken = generated(options, folder)
    rows: list[Row] = []
    for precision, answers in found.items():
        if "failure" in answers:
            rows.append(Row.broken("generation", precision, Failure(**answers["failure"])))
            continue
        for case, logits in expected[precision]["logits"].items():
            theirs, ours, exact = (list(chain.from_iterable(places)) for places in (
                logits, answers["logits"][case], expected["fp32"]["logits"][case]))
            limit = max(CURVE_LIMIT, ROUNDINGS * largest(exact, theirs))
            rows.append(Row("generation", f"{case}, {precision}", largest(theirs, ours), "difference", limit))
        words = zip(*(chain.from_iterable(side["words"]) for side in (expected[precision], answers)), strict=True)
        # where two words are alike, roundings decide, and all that follows is another text
        rows.append(Row("generation", f"greedy answers, {precision}", sum(a != b for a, b in words), "other words",
                        0 if precision == "fp32" else None))
    return rows + [Row.broken("generation", REST if rows else WHOLE, failure) for failure in broken]


def generated(options: Options, folder: Path, *, is_reference: bool = False
              ) -> tuple[dict[str, dict[str, Any]], list[Failure]]:
    """What npu_acceptance_generation.py has written, by precision, and what ended it before it was done.

    Raises:
        RunFailed: it wrote nothing, or is the reference and has failed anywhere.
    """
    device = "cpu" if is_reference else options.device
    name = f"generation-{'reference' if is_reference else device}"
    file = (Path(options.out) / f"{name}.jsonl").absolute()
    file.unlink(missing_ok=True)
    broken: list[Failure] = []
    try:
        run(options, name, [str(Path(__file__).with_name("npu_acceptance_generation.py")), "--load", str(folder),
                            "--file", str(file), "--device", device], is_reference=is_reference)
    except RunFailed as error:
        if is_reference or not file.exists():
            raise
        broken = [error.failure]
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if is_reference and any("failure" in record for record in records):
        raise RunFailed(next(Failure(**record["failure"]) for record in records if "failure" in record))
    return {record["precision"]: record for record in records}, broken


def small_model(options: Options) -> Path:
    """Weights of every curve and of generation; they are the same whenever they are made."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = (Path(options.out) / "small").absolute()
    torch.manual_seed(0)
    # bf16 numbers: every precision starts from the same weights
    Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False, pad_token_id=None)).bfloat16().save_pretrained(
        folder)
    return folder


def largest(left: list[float], right: list[float]) -> float:
    """The largest difference of two curves; nan counts as infinite."""
    return max(abs(a - b) if a == a and b == b else float("inf") for a, b in zip(left, right, strict=True))


def speed_rows(options: Options, ranks: int) -> list[Row]:
    """Memory against the planner, tokens/s and MFU of a preset on one accelerator, bf16."""
    from modellink.config.settings import parse_settings
    from modellink.planner.plan import Plan
    from modellink.runtime import prepare_run

    words = ["--model", options.model, "--seq-length", str(options.seq_length), "--micro-batch-size", "1",
             "--global-batch-size", "1", "--lr", "1e-4", "--bf16"]
    settings = parse_settings("npu_acceptance.py", TITLE, [*words, "--mock-data", "--train-iters", "1"])
    planned = Plan.of(prepare_run(settings, 1, "train", elsewhere=True)).stages[0].total / 2**30
    records = train(options, "speed", options.device, words)
    half = records[len(records) // 2:]  # the first steps compile and allocate
    name = f"{Path(options.model).name}, {options.seq_length} tokens, bf16"
    peak = max(record["memory_gib"] for record in records)
    mfu = None if half[0]["mfu"] is None else sum(record["mfu"] for record in half) / len(half)
    speed = sum(record["tokens_per_second_per_device"] for record in half) / len(half)
    return [Row("speed", f"{name}: peak memory", peak, "GiB"), Row("speed", f"{name}: planned memory", planned, "GiB"),
            Row("speed", f"{name}: peak against plan", abs(peak / planned - 1), "of the plan",
                MEMORY_LIMIT if planned >= MEMORY_JUDGED_GIB else None),
            Row("speed", f"{name}: speed", speed, "tokens/s"), Row("speed", f"{name}: MFU", mfu, "of the peak rate")]


Part = Callable[[Options, int], list[Row]]
PARTS: dict[str, Part] = {"operators": operator_rows, "collectives": collective_rows, "curve": curve_rows,
                          "generation": generation_rows, "speed": speed_rows}

if __name__ == "__main__":
    sys.exit(run_command(main))
