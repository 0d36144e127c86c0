"""Converter against `cp`: time for the same bytes, and peak anonymous memory of the process tree.

    python benchmarks/convert.py [--shape 0.5b|1.8b|7b] [--rounds 3] [--layers N] [--workers N] [--transformers]

Every round times, after a sync and in the same order, `cp` of the weights and each conversion as a process of its own,
into files in the page cache; the table shows the fastest round of each: the whole process (interpreter and imports
included), the same plus the sync that brings the output to the disk, and the conversion alone as it reports itself.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from modellink.checkpoint.chunks import LazyTensor  # noqa: E402
from modellink.checkpoint.hf import write_weights  # noqa: E402
from modellink.checkpoint.qwen15 import hf_rules  # noqa: E402
from modellink.config import ConfigError, run_command  # noqa: E402
from modellink.config.fields import flag  # noqa: E402
from modellink.config.model import ModelConfig  # noqa: E402
from modellink.config.parser import parse_sections  # noqa: E402
from modellink.models.presets.qwen15 import PRESETS  # noqa: E402

TOOL = Path(__file__).resolve().parents[1] / "tools" / "checkpoint" / "convert_ckpt.py"
RESULTS = Path(__file__).resolve().parent / "results"
POLL_SECONDS = 0.005
TOUCH_AT_MOST = 4 << 30


@dataclass(frozen=True)
class BenchmarkFlags:
    """What to measure."""

    rounds: int = flag(3, "rounds; the fastest of each counts")
    shape: str = flag("0.5b", "shape of the random weights", choices=["0.5b", "1.8b", "7b"])
    layers: int | None = flag(None, "layers, fewer for a quick look (default: the shape's)", type=int)
    workers: int = flag(1, "processes of the converter")
    transformers: bool = flag(False, "also measure transformers' from_pretrained and save_pretrained")
    work_dir: str | None = flag(None, "folder for the weights, on the disk to measure (default: a temporary one)")
    output: str | None = flag(None, "JSON file of the result (default: benchmarks/results/convert-SHAPE.json)")


def random_weights(folder: Path, model: ModelConfig) -> int:
    """Write a random bf16 model; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.to_hf()))

    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(name, shape, torch.bfloat16, 0, lambda: [torch.randn(shape)])

    tensors = [lazy(tensor.name, tensor.shape) for tensor, _ in hf_rules(model).values()]
    return sum(write_weights(folder, tensors))


def anonymous_bytes(process: psutil.Process) -> int:
    """Anonymous memory of a process and its descendants now."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total


def touch_free_memory(size: int) -> None:
    """Touch and free `size` bytes, so that every command finds pages that the host of a virtual machine has backed.

    Without it the first writer of fresh pages waits for the host (ten times slower here), whichever command it is.
    """
    subprocess.run([sys.executable, "-c", f"bytearray(b'1') * {size}"], check=True)


@dataclass(frozen=True)
class Measured:
    """One command.

    Attributes:
        seconds: of the whole process.
        synced: the same plus the sync that brings its output to the disk.
        inner: what the converter itself reports, without interpreter start and imports; the whole for cp.
        peak: anonymous bytes of the process tree, sampled.
    """

    seconds: float
    synced: float
    inner: float
    peak: int


def measure(command: Sequence[str | Path], touched: int) -> Measured:
    """Run one command from a synced disk."""
    subprocess.run(["sync"], check=True)
    touch_free_memory(touched)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said)
        process = psutil.Process(child.pid)
        peak = 0
        while child.poll() is None:
            try:
                peak = max(peak, anonymous_bytes(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(POLL_SECONDS)
        if child.wait():
            raise RuntimeError(f"{command} ended with {child.returncode}")
        seconds = time.perf_counter() - start
        subprocess.run(["sync"], check=True)
        synced = time.perf_counter() - start
        said.seek(0)
        reported = re.search(r"wrote .* in ([\d.]+) s", said.read())
    return Measured(seconds, synced, float(reported[1]) if reported else seconds, peak)


REWRITE = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


def conversions(folder: Path, flags: BenchmarkFlags) -> dict[str, list[str | Path]]:
    """The measured commands; each writes a new folder below `folder`, in an order in which sources exist."""
    base: list[str | Path] = [sys.executable, TOOL, "--workers", str(flags.workers)]
    rewrite: list[str | Path] = [sys.executable, "-c", REWRITE, folder / "hf", folder / "out-rewritten"]
    cut = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    return {
        "cp": ["cp", "-r", folder / "hf", folder / "out-cp"],
        "HF -> TP1": [*base, "--from", "hf", "--load-dir", folder / "hf", "--save-dir", folder / "out-tp1"],
        "TP1 -> HF": [*base, "--to", "hf", "--load-dir", folder / "out-tp1", "--save-dir", folder / "out-hf1"],
        "HF -> TP2 PP2": [*base, "--from", "hf", "--load-dir", folder / "hf", "--save-dir", folder / "out-tp2", *cut],
        "TP2 PP2 -> HF": [*base, "--to", "hf", "--load-dir", folder / "out-tp2", "--save-dir", folder / "out-hf2"],
        **({"transformers": rewrite} if flags.transformers else {}),
    }


def main(argv: Sequence[str] | None = None) -> int:
    (flags,), _ = parse_sections("convert.py", "Measure the converter.", [BenchmarkFlags], argv)
    for name in ("rounds", "layers", "workers"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be above 0.")
    if flags.layers is not None and flags.layers % 2:
        raise ConfigError(f"--layers {flags.layers}: two pipeline stages need an even number.")
    model = PRESETS[f"qwen15-{flags.shape}"]
    model = dataclasses.replace(model, num_layers=flags.layers or model.num_layers)
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=flags.work_dir))
    try:
        total = random_weights(folder / "hf", model)
        runs: dict[str, list[Measured]] = {
            "import torch": [measure([sys.executable, "-c", "import torch, safetensors"], 1 << 30)]}
        for _ in range(flags.rounds):
            for name, command in conversions(folder, flags).items():
                runs.setdefault(name, []).append(measure(command, min(2 * total, TOUCH_AT_MOST)))
                for done in ("out-cp", "out-hf1", "out-hf2", "out-rewritten"):  # nothing reads them; disks are small
                    shutil.rmtree(folder / done, ignore_errors=True)
            for path in folder.glob("out-*"):
                shutil.rmtree(path)
    finally:
        shutil.rmtree(folder)
    best = {name: Measured(min(run.seconds for run in rounds), min(run.synced for run in rounds),
                           min(run.inner for run in rounds), max(run.peak for run in rounds))
            for name, rounds in runs.items()}
    cp = best["cp"]
    print(f"{total / 1e9:.3f} GB bf16; fastest of {flags.rounds} rounds, largest peak; in brackets: times cp")
    print(f"{'':14} {'whole process':>16} {'with sync':>16} {'without imports':>16} {'peak anonymous':>15}")
    for name, run in best.items():
        columns = [f"{getattr(run, key):.2f} s ({getattr(run, key) / getattr(cp, key):.1f})"
                   for key in ("seconds", "synced", "inner")]
        print(f"{name:14} " + " ".join(f"{column:>16}" for column in columns) + f" {run.peak / 1e6:12.0f} MB")
    result = {"bytes": total, "flags": dataclasses.asdict(flags), "torch": torch.__version__,
              "best": {name: dataclasses.asdict(run) for name, run in best.items()},
              "runs": {name: [dataclasses.asdict(run) for run in rounds] for name, rounds in runs.items()}}
    output = Path(flags.output) if flags.output else RESULTS / f"convert-{flags.shape}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
