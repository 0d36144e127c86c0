"""Training step in one process against transformers: tokens/s, TFLOP/s, MFU, peak memory and bytes of state.

    python benchmarks/train_step.py [--device cpu|cuda|npu] [--shape small|0.5b|1.8b|4b|7b] [--layers N]
                                    [--seq-length N] [--precision fp32|bf16] [--output FILE]

Each side runs in a process of its own. With `--turns step`, the default on the CPU, both live and make one step in
turn, so that a slow minute of the machine slows both; the ratio is the median over the pairs of steps. With `--turns
run`, the default elsewhere, where two models may not fit, one runs after the other, and the ratio is that of the best
runs. It is printed and written as JSON. The peer is transformers' Qwen2 with SDPA and torch's fused AdamW, and with
liger-kernel's kernels where they are installed and the device is cuda; in bf16 it keeps fp32 master weights
(autocast), as the training loop here does. FLOPs count attention causally; MFU needs the chip's datasheet rate
(`modellink/device/specs.py`) and is n/a where that is unknown. Peak memory is the process's on the CPU (libraries
included) and the allocator's elsewhere. `--clock cpu` counts the process's own time: for a machine that others use
too.
"""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turns import run_in_turn, wait_for_turn

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

SHAPE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
                         "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2048,
                         "tie_word_embeddings": False}
SHAPES = ("small", "0.5b", "1.8b", "4b", "7b")
PRECISIONS = ("fp32", "bf16")
LAYOUTS = {"one": [], "tp2": ["--tensor-model-parallel-size", "2"],
           "tp2-sp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
           "pp2": ["--pipeline-model-parallel-size", "2"]}


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    """The config.json of the shape, with as many layers as asked."""
    from modellink.models.presets.qwen15 import PRESETS

    small = SHAPE | {"rope_theta": 10000.0, "model_type": "qwen2"}
    shape = small if options.shape == "small" else PRESETS[f"qwen15-{options.shape}"].to_hf()
    return shape | {"num_hidden_layers": options.layers or shape["num_hidden_layers"],
                    "max_position_embeddings": max(options.seq_length, shape["max_position_embeddings"])}


def peak_memory() -> int:
    """Peak resident bytes of this whole process, libraries included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def time_steps(options: argparse.Namespace, device: Any, step: Callable[[], Any]) -> list[float]:
    """Seconds of every step, the warm-up among them."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    times = []
    for _ in range(options.steps):
        if options.paced:
            wait_for_turn()
        device.synchronize()
        start = clock()
        step()
        device.synchronize()
        times.append(clock() - start)
    return times


def run_peer(options: argparse.Namespace) -> dict[str, Any]:
    """transformers: forward, backward, clip, AdamW."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from modellink.device.select import select_device

    shape, chosen = shape_of(options), select_device(options.device)
    # what modellink sets up for the CPU is no part of the peer
    device = torch.device("cpu") if chosen.name == "cpu" else chosen.set_current(0)
    kernels = "transformers, SDPA"
    if chosen.name == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
        kernels += ", liger-kernel"
    torch.manual_seed(0)
    with device:
        model: Any = Qwen2ForCausalLM._from_config(Qwen2Config(**shape), attn_implementation="sdpa")
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        tokens = torch.randint(0, shape["vocab_size"], (options.batch, options.seq_length), device=device)
        for row in tokens.split(options.micro_batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                loss = model(input_ids=row, labels=row).loss * len(row) / options.batch
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    times = time_steps(options, chosen, step)
    count = sum(parameter.numel() for parameter in model.parameters())
    state = count * 4 + sum(tensor.numel() * tensor.element_size() for entry in optimizer.state.values()
                            for tensor in entry.values()) + 4 * count  # weights, Adam, gradients while they live
    return summary(options, chosen, times, count, state) | {"kernels": kernels}


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """modellink: the training loop's own step."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(shape_of(options)))
    from modellink.config.settings import parse_settings
    from modellink.runtime import prepare_run
    from modellink.start import start

    run = prepare_run(parse_settings("bench", "", [
        "--model", str(folder), "--mock-data", "--seq-length", str(options.seq_length),
        "--train-iters", str(options.steps), "--lr", "1e-4", "--micro-batch-size", str(options.micro_batch),
        "--global-batch-size", str(options.batch), f"--{options.precision}", "--eval-iters", "0", "--split", "100,0,0",
        "--device", options.device, *LAYOUTS[options.layout], *shlex.split(options.flags)]),
        int(os.environ.get("WORLD_SIZE", 1)), "train")
    device = start(run)
    import torch.distributed as dist

    from modellink.models.forms import situation_of
    from modellink.ops.table import choose
    from modellink.training.loop import Trainer, build_state, load_data

    trainer = Trainer(build_state(run, device))
    reader = trainer.reader(load_data(run)[0])
    times = time_steps(options, device, lambda: trainer.step(reader, [0, 0]))
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
    return summary(options, device, times, count, sum(held.values()) + adam) | {"kernels": kernels}


def summary(options: argparse.Namespace, device: Any, times: list[float], count: int, state: int) -> dict[str, Any]:
    """The numbers of one side."""
    from modellink.config.model import ModelConfig
    from modellink.device.specs import find_spec
    from modellink.training.metrics import flops_per_token

    median = statistics.median(times[options.warmup:])
    rate = options.batch * options.seq_length / median
    flops = rate * flops_per_token(ModelConfig.from_hf(shape_of(options), "the benchmark"), options.seq_length)
    spec = find_spec(device.product_name())
    return {"tokens_per_second": rate, "seconds": median, "times": times[options.warmup:], "tflops": flops / 1e12,
            "mfu": flops / spec.bf16_flops if spec and options.precision == "bf16" else None,
            "peak_bytes": peak_memory() if device.name == "cpu" else device.peak_memory(), "parameters_on_rank": count,
            "state_bytes_per_parameter": state / count, "device": device.product_name()}


def command(side: str, precision: str, options: argparse.Namespace, layout: str = "one", ranks: int = 1) -> list[str]:
    """The command of one side."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(Path(__file__)), "--side", side, "--precision", precision,
            "--layout", layout, "--steps", str(options.steps), "--warmup", str(options.warmup),
            "--batch", str(options.batch),
            "--micro-batch", str(options.micro_batch), "--seq-length", str(options.seq_length),
            "--device", options.device, "--shape", options.shape, "--layers", str(options.layers),
            "--clock", options.clock, f"--flags={options.flags}"]


def result(output: str) -> dict[str, Any]:
    """The numbers that a side printed."""
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{\"tok")))


def measure(side: str, precision: str, options: argparse.Namespace, layout: str = "one", ranks: int = 1) -> dict:
    """Run one side in its own process (or ranks) and return its numbers."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, options.threads // ranks)))
    done = subprocess.run(command(side, precision, options, layout, ranks), env=environment, capture_output=True,
                          text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return result(done.stdout)


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
    found = {side: result(output) for side, output in outputs.items()}
    pairs = zip(found["ours"]["times"], found["peer"]["times"], strict=True)
    return found, statistics.median(peer / ours for ours, peer in pairs)


def row(name: str, record: dict[str, Any]) -> str:
    """A line of the table."""
    mfu = f"{100 * record['mfu']:.1f} %" if record["mfu"] is not None else "n/a"
    return (f"{name:12} {record['tokens_per_second']:10.0f} {record['tflops']:9.3f} {mfu:>7} "
            f"{record['peak_bytes'] / 2**30:9.2f} {record['state_bytes_per_parameter']:11.1f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training step against transformers, in one run.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "npu"), help="where to run")
    parser.add_argument("--shape", default="small", choices=SHAPES, help="small (8 x 512), or a size of Qwen1.5")
    parser.add_argument("--layers", type=int, default=0, help="this many layers of the shape (default: all)")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this precision (default: both)")
    parser.add_argument("--steps", type=int, default=8, help="steps a side, the warm-up among them")
    parser.add_argument("--warmup", type=int, default=2, help="steps left out of the median")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--micro-batch", type=int, default=2, help="samples of one forward pass")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens a sample")
    parser.add_argument("--turns", choices=("step", "run"),
                        help="the sides take turns by step (default on cpu) or by run")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side by run; the best counts")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: time of the process alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of a side")
    parser.add_argument("--flags", default="", help="further flags of pretrain_gpt.py for our side, in one string")
    parser.add_argument("--layouts", action="store_true", help="also TP2 and PP2 with half the threads a rank")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "results" / "train_step.json")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--layout", default="one", help=argparse.SUPPRESS)
    parser.add_argument("--paced", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(run_ours(options) if options.side == "ours" else run_peer(options)), flush=True)
        return
    results: dict[str, Any] = {"options": {name: value for name, value in vars(options).items() if name != "output"}}
    for precision in [options.precision] if options.precision else PRECISIONS:
        in_steps = (options.turns or ("step" if options.device == "cpu" else "run")) == "step"
        best, ratio = (steps_in_turn if in_steps else runs_in_turn)(precision, options)
        best["ours"]["speed_ratio"] = ratio
        best["ours"]["memory_ratio"] = best["ours"]["peak_bytes"] / best["peer"]["peak_bytes"]
        results[precision] = best
        print(f"{precision:12} {'tokens/s':>10} {'TFLOP/s':>9} {'MFU':>7} {'peak GiB':>9} {'B/parameter':>11}"
              f"   {options.shape} on {best['ours']['device']}, against {best['peer']['kernels']}")
        for side, record in best.items():
            print(row(side, record))
        if options.layouts:
            for layout in ("tp2", "tp2-sp", "pp2"):
                record = measure("ours", precision, options, layout, 2)
                record["ratio_to_one_process"] = record["tokens_per_second"] / best["ours"]["tokens_per_second"]
                results[precision][layout] = record
                print(row(layout, record), f"  two ranks: {record['ratio_to_one_process']:.2f}x of one process")
        print(f"{precision} ratio {best['ours']['speed_ratio']:.2f}x tokens/s, "
              f"{best['ours']['memory_ratio']:.2f}x peak memory", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
