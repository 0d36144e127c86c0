"""Training step in one process against transformers: tokens/s, TFLOP/s, MFU, peak memory and bytes of state.

    python benchmarks/train_step.py [--device cpu|cuda|npu] [--shape small|0.5b|1.8b|4b|7b] [--layers N]
                                    [--seq-length N] [--precision fp32|bf16] [--flags="--compile pointwise"]
                                    [--output FILE]

Each side runs in a process of its own. Both start from the same weights and read the same samples, and the program
ends where the losses of their steps differ by more than rounding. With `--turns step`, the default on the CPU, both
live and make one step in turn, so that a slow minute of the machine slows both; the ratio is the median over the pairs
of steps. With `--turns run`, the default elsewhere, where two models may not fit, one runs after the other, and the
ratio is that of the best runs. It is printed and written as JSON. The peer is transformers' Qwen2 with SDPA and torch's
fused AdamW, and with liger-kernel's kernels where they are installed and the device is cuda; in bf16 it keeps fp32
master weights (autocast), as the training loop here does. Our side, too, takes its fused kernels from liger-kernel on
cuda; where that is missing, `--flags "--compile pointwise"` compiles them instead. FLOPs count attention causally; MFU
needs the chip's datasheet rate (`modellink/device/specs.py`) and is n/a where that is unknown. Peak memory is the
process's on the CPU (libraries included) and the allocator's elsewhere; `fits.py` estimates it beforehand.
"""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flags import PRECISIONS, add_output, add_place, check_further_flags, check_place, number, open_output
from shapes import TRAINING, add_shape, shape_of
from sides import numbers, peak_bytes, require_same_losses, run_side
from turns import run_in_turn, wait_for_turn

from modellink.config.errors import ConfigError, run_command
from modellink.config.parser import Parser

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

SEED = 1234
LEARNING_RATE = 1e-4
LAYOUTS = {"one": [], "tp2": ["--tensor-model-parallel-size", "2"],
           "tp2-sp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
           "pp2": ["--pipeline-model-parallel-size", "2"]}


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """The config.json of what both sides train."""
    return shape_of(options.shape, TRAINING, layers=options.layers, positions=options.seq_length)


def time_steps(options: argparse.Namespace, device: Any, step: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Seconds and losses of every step, the warm-up among them."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times, losses = [], []
    for _ in range(options.steps):
        if options.paced:
            wait_for_turn()
        device.synchronize()
        start = clock()
        losses.append(step())
        device.synchronize()
        times.append(clock() - start)
    return times, losses


def run_peer(options: argparse.Namespace) -> dict[str, Any]:
    """transformers: forward, backward, clip, AdamW."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from weights import DrawnWeights

    from modellink.config.model import ModelConfig
    from modellink.data.mock import MockDataset
    from modellink.device.select import select_device

    config, chosen = shape(options), select_device(options.device)
    # what modellink sets up for the CPU is no part of the peer
    device = torch.device("cpu") if chosen.name == "cpu" else chosen.set_current(0)
    kernels = "transformers, SDPA"
    if chosen.name == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
        kernels += ", liger-kernel"
    with device:  # the presets name bf16, the dtype of the published weights
        model: Any = Qwen2ForCausalLM._from_config(Qwen2Config(**config | {"use_cache": False}), dtype=torch.float32,
                                                   attn_implementation="sdpa")
    model = model.to(device).train()
    DrawnWeights(ModelConfig.from_hf(config, "the benchmark"), device).fill(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    data = MockDataset(config["vocab_size"], options.seq_length, options.steps * options.batch, SEED)
    samples = iter(range(len(data)))

    def step() -> float:
        total = torch.zeros((), device=device)
        for _ in range(options.batch // options.micro_batch):
            rows = [data[next(samples)] for _ in range(options.micro_batch)]
            tokens, labels = (torch.stack([row[name] for row in rows]).to(device) for name in ("tokens", "labels"))
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                loss = model(input_ids=tokens, labels=labels, shift_labels=labels).loss * len(rows) / options.batch
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    timed = time_steps(options, chosen, step)
    parameters = list(model.parameters())
    held = [*parameters, *parameters, *(tensor for entry in optimizer.state.values() for tensor in entry.values())]
    # weights, gradients of the same dtype while they live, Adam
    return summary(options, chosen, *timed, count=sum(parameter.numel() for parameter in parameters),
                   state=sum(tensor.numel() * tensor.element_size() for tensor in held)) | {"kernels": kernels}


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """modellink: the training loop's own step."""
    from modellink.config.settings import parse_settings
    from modellink.runtime import prepare_run
    from modellink.start import start

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape(options)))
        run = prepare_run(parse_settings("bench", "", [
            "--model", folder, "--mock-data", "--seq-length", str(options.seq_length), "--seed", str(SEED),
            "--train-iters", str(options.steps), "--lr", str(LEARNING_RATE), "--lr-decay-style", "constant",
            "--micro-batch-size", str(options.micro_batch), "--global-batch-size", str(options.batch),
            f"--{options.precision}", "--eval-iters", "0", "--split", "100,0,0", "--device", options.device,
            *LAYOUTS[options.layout], *shlex.split(options.flags)]), int(os.environ.get("WORLD_SIZE", 1)), "train")
    device = start(run)
    import torch.distributed as dist
    from weights import DrawnWeights

    from modellink.models.forms import situation_of
    from modellink.ops.table import choose
    from modellink.training.loop import Trainer, build_state, load_data
    from modellink.training.state import load_weights

    trainer = Trainer(build_state(run, device))
    load_weights(trainer.state, DrawnWeights(run.model, device.current()))
    reader = trainer.reader(load_data(run)[0])
    timed = time_steps(options, device, lambda: trainer.step(reader, [0, 0])[0].loss)
    chunks = [chunk.module for chunk in trainer.state.chunks]
    count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    held: dict[int, int] = {}
    for chunk in trainer.state.chunks:
        for parameter in chunk.module.parameters():
            for tensor in (parameter, parameter.main_grad, getattr(parameter, "main_param", None)):
                if tensor is not None:
                    held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    inner = trainer.state.optimizer.chained_optimizers[0].optimizer
    adam = sum(tensor.numel() * tensor.element_size() for entry in inner.state.values() for tensor in entry.values())
    if dist.get_rank() != 0:
        return {}
    kernels = {choice.operation: choice.form.name for choice in choose(situation_of(run, device))}
    return summary(options, device, *timed, count=count, state=sum(held.values()) + adam) | {"kernels": kernels}


def utilisation(rate: float, config: dict[str, Any], options: argparse.Namespace, product: str) -> dict[str, Any]:
    """TFLOP/s and MFU of `rate` tokens/s on a device with this product name."""
    from modellink.config.model import ModelConfig
    from modellink.device.specs import find_spec
    from modellink.training.metrics import flops_per_token

    flops = rate * flops_per_token(ModelConfig.from_hf(config, "the benchmark"), options.seq_length)
    spec = find_spec(product)
    return {"tflops": flops / 1e12, "mfu": flops / spec.bf16_flops if spec and options.precision == "bf16" else None}


def summary(options: argparse.Namespace, device: Any, times: list[float], losses: list[float], *, count: int,
            state: int) -> dict[str, Any]:
    """The numbers of one side."""
    median = statistics.median(times[options.warmup:])
    rate = options.batch * options.seq_length / median
    return {"tokens_per_second": rate, "seconds": median, "times": times[options.warmup:], "losses": losses,
            **utilisation(rate, shape(options), options, device.product_name()),
            "peak_bytes": peak_bytes(device), "parameters_on_rank": count,
            "state_bytes_per_parameter": state / count, "device": device.product_name()}


def command(side: str, precision: str, options: argparse.Namespace, layout: str = "one", ranks: int = 1) -> list[str]:
    """The command of one side."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    layers = ["--layers", str(options.layers)] if options.layers else []
    return [sys.executable, *launcher, str(Path(__file__)), "--side", side, "--precision", precision,
            "--layout", layout, "--steps", str(options.steps), "--warmup", str(options.warmup),
            "--batch", str(options.batch), "--micro-batch", str(options.micro_batch),
            "--seq-length", str(options.seq_length), "--device", options.device, "--shape", options.shape, *layers,
            "--clock", options.clock, f"--flags={options.flags}"]


def measure(side: str, precision: str, options: argparse.Namespace, layout: str = "one", ranks: int = 1) -> dict:
    """Run one side in its own process (or ranks) and return its numbers."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, options.threads // ranks)))
    return run_side(command(side, precision, options, layout, ranks), environment)


def runs_in_turn(precision: str, options: argparse.Namespace) -> tuple[dict[str, dict], float]:
    """The best run of each side, one after the other, and the ratio of their speeds."""
    turns: dict[str, list[dict]] = {"ours": [], "peer": []}
    for _ in range(options.rounds):
        for side in turns:
            turns[side].append(measure(side, precision, options))
    best = {side: max(found, key=lambda record: record["tokens_per_second"]) for side, found in turns.items()}
    return best, best["ours"]["tokens_per_second"] / best["peer"]["tokens_per_second"]


def steps_in_turn(precision: str, options: argparse.Namespace) -> tuple[dict[str, dict], float]:
    """Both sides alive, one step in turn, and the median ratio of the pairs."""
    commands = {side: [*command(side, precision, options), "--paced"] for side in ("ours", "peer")}
    outputs = run_in_turn(commands, dict(os.environ, OMP_NUM_THREADS=str(options.threads)), options.steps)
    found = {side: numbers(output) for side, output in outputs.items()}
    pairs = zip(found["ours"]["times"], found["peer"]["times"], strict=True)
    return found, statistics.median(peer / ours for ours, peer in pairs)


def row(name: str, record: dict[str, Any]) -> str:
    """A line of the table."""
    mfu = f"{100 * record['mfu']:.1f} %" if record["mfu"] is not None else "n/a"
    return (f"{name:12} {record['tokens_per_second']:10.0f} {record['tflops']:9.3f} {mfu:>7} "
            f"{record['peak_bytes'] / 2**30:9.2f} {record['state_bytes_per_parameter']:11.1f}")


def make_parser() -> Parser:
    parser = Parser(prog="train_step.py", description="Training step against transformers, in one run.")
    add_place(parser)
    add_shape(parser, "8 layers of width 512, vocabulary 32000")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this precision (default: both)")
    parser.add_argument("--steps", type=number, default=8, help="steps a side, the warm-up among them")
    parser.add_argument("--warmup", type=number, default=2, help="steps left out of the median")
    parser.add_argument("--batch", type=number, default=4, help="samples a step")
    parser.add_argument("--micro-batch", type=number, default=2, help="samples of one forward pass")
    parser.add_argument("--seq-length", type=number, default=512, help="tokens a sample")
    parser.add_argument("--turns", choices=("step", "run"),
                        help="the sides take turns by step (default on cpu) or by run")
    parser.add_argument("--rounds", type=number, default=2, help="turns of each side by run; the best counts")
    parser.add_argument("--threads", type=number, default=os.cpu_count() or 1, help="CPU threads of a side")
    parser.add_argument("--flags", default="", help="further flags of pretrain_gpt.py for our side, in one string")
    parser.add_argument("--layouts", action="store_true", help="also TP2 and PP2 with half the threads a rank")
    add_output(parser, "train_step.json")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--layout", default="one", help=argparse.SUPPRESS)
    parser.add_argument("--paced", action="store_true", help=argparse.SUPPRESS)
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises:
        ConfigError: flags that contradict each other or cannot be met here.
    """
    if options.warmup >= options.steps:
        raise ConfigError(f"--steps {options.steps}: no step is left after --warmup {options.warmup}; give more steps.")
    if options.batch % options.micro_batch:
        raise ConfigError(f"--batch {options.batch} is not a multiple of --micro-batch {options.micro_batch}; "
                          "change one of them.")
    check_further_flags(options.flags)
    check_place(options)
    open_output(options.output)


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    if options.side:
        print(json.dumps(run_ours(options) if options.side == "ours" else run_peer(options)), flush=True)
        return 0
    check(options)
    results: dict[str, Any] = {"options": {name: value for name, value in vars(options).items() if name != "output"}}
    for precision in [options.precision] if options.precision else PRECISIONS:
        in_steps = (options.turns or ("step" if options.device == "cpu" else "run")) == "step"
        best, ratio = (steps_in_turn if in_steps else runs_in_turn)(precision, options)
        difference = require_same_losses(best["ours"]["losses"], best["peer"]["losses"], precision)
        best["ours"]["speed_ratio"] = ratio
        best["ours"]["memory_ratio"] = best["ours"]["peak_bytes"] / best["peer"]["peak_bytes"]
        best["ours"]["largest_difference_of_losses"] = difference
        results[precision] = best
        print(f"{precision:12} {'tokens/s':>10} {'TFLOP/s':>9} {'MFU':>7} {'peak GiB':>9} {'B/parameter':>11}"
              f"   {options.shape} on {best['ours']['device']}, against {best['peer']['kernels']}")
        for side, record in best.items():
            print(row(side, record))
        if options.layouts:
            for layout in ("tp2", "tp2-sp", "pp2"):
                record = measure("ours", precision, options, layout, 2)
                require_same_losses(record["losses"], best["ours"]["losses"], precision)
                record["ratio_to_one_process"] = record["tokens_per_second"] / best["ours"]["tokens_per_second"]
                results[precision][layout] = record
                print(row(layout, record), f"  two ranks: {record['ratio_to_one_process']:.2f}x of one process")
        print(f"{precision} ratio {best['ours']['speed_ratio']:.2f}x tokens/s, "
              f"{best['ours']['memory_ratio']:.2f}x peak memory; losses within {difference:.0e}", flush=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
