"""Training step in one process against transformers: tokens/s, peak memory and bytes of state.

    python benchmarks/train_step.py [--precision fp32|bf16] [--output FILE]

Each side runs in a process of its own, in turn, so that neither heats the other's caches or memory; the ratio of the
medians is printed and written as JSON. The peer is transformers' Qwen2 with SDPA and torch's fused AdamW; in bf16 it
keeps fp32 master weights (autocast), as the training loop here does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

SHAPE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2048,
         "tie_word_embeddings": False}
PRECISIONS = ("fp32", "bf16")


def peak_memory() -> int:
    """Peak resident bytes of this whole process, libraries included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def run_peer(options: argparse.Namespace) -> dict[str, Any]:
    """transformers: forward, backward, clip, AdamW."""
    import time

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    device = torch.device(options.device)
    model: Any = Qwen2ForCausalLM._from_config(Qwen2Config(**SHAPE), attn_implementation="sdpa")
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times = []
    for _ in range(options.steps):
        tokens = torch.randint(0, SHAPE["vocab_size"], (options.batch, options.seq_length), device=device)
        start = time.perf_counter()
        for row in tokens.split(options.micro_batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                loss = model(input_ids=row, labels=row).loss * len(row) / options.batch
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss)
        times.append(time.perf_counter() - start)
    count = sum(parameter.numel() for parameter in model.parameters())
    state = count * 4 + sum(tensor.numel() * tensor.element_size() for entry in optimizer.state.values()
                            for tensor in entry.values()) + 4 * count  # weights, Adam, gradients while they live
    return summary(options, times, count, state)


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """modellink: the training loop's own step."""
    import time

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(SHAPE | {"model_type": "qwen2", "rope_theta": 10000.0}))
    from modellink.config.settings import parse_settings
    from modellink.runtime import prepare_run
    from modellink.start import start

    layout = {"tp2": ["--tensor-model-parallel-size", "2"], "tp2-sp": ["--tensor-model-parallel-size", "2",
              "--sequence-parallel"], "pp2": ["--pipeline-model-parallel-size", "2"], "one": []}[options.layout]
    run = prepare_run(parse_settings("bench", "", [
        "--model", str(folder), "--mock-data", "--seq-length", str(options.seq_length),
        "--train-iters", str(options.steps), "--lr", "1e-4", "--micro-batch-size", str(options.micro_batch),
        "--global-batch-size", str(options.batch), f"--{options.precision}", "--eval-iters", "0", "--split", "100,0,0",
        "--device", options.device, *layout]), int(os.environ.get("WORLD_SIZE", 1)), "train")
    device = start(run)
    from modellink.training.loop import Trainer, build_state, load_data

    trainer = Trainer(build_state(run, device))
    reader = trainer.reader(load_data(run)[0])
    times = []
    for _ in range(options.steps):
        begin = time.perf_counter()
        trainer.step(reader, [0, 0])
        device.synchronize()
        times.append(time.perf_counter() - begin)
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
    import torch.distributed as dist

    if dist.get_rank() != 0:
        return {}
    return summary(options, times, count, sum(held.values()) + adam)


def summary(options: argparse.Namespace, times: list[float], count: int, state: int) -> dict[str, Any]:
    median = statistics.median(times[options.warmup:])
    return {"tokens_per_second": options.batch * options.seq_length / median, "seconds": median,
            "parameters_on_rank": count, "state_bytes_per_parameter": state / count,
            "peak_bytes": peak_memory()}


def measure(side: str, precision: str, options: argparse.Namespace, layout: str = "one", ranks: int = 1) -> dict:
    """Run one side in its own process (or ranks) and return its numbers."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(Path(__file__)), "--side", side, "--precision", precision, "--layout", layout,
                "--steps", str(options.steps), "--batch", str(options.batch), "--micro-batch", str(options.micro_batch),
                "--seq-length", str(options.seq_length), "--device", options.device]
    done = subprocess.run(command, env=dict(os.environ, OMP_NUM_THREADS=str(threads)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{\"tok")))


def main() -> None:
    parser = argparse.ArgumentParser(description="Training step against transformers, in one run.")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this precision (default: both)")
    parser.add_argument("--steps", type=int, default=8, help="steps a side, the first two are warm-up")
    parser.add_argument("--warmup", type=int, default=2, help="steps left out of the median")
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--micro-batch", type=int, default=2, help="samples of one forward pass")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens a sample")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side; the best counts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--layouts", action="store_true", help="also TP2 and PP2 with one thread a rank")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "results" / "train_step.json")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--layout", default="one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_ours(options) if options.side == "ours" else run_peer(options)), flush=True)
        return
    results: dict[str, Any] = {}
    for precision in [options.precision] if options.precision else PRECISIONS:
        turns: dict[str, list[dict]] = {"ours": [], "peer": []}
        for _ in range(options.rounds):
            for side in turns:
                turns[side].append(measure(side, precision, options))
        best = {side: max(found, key=lambda record: record["tokens_per_second"]) for side, found in turns.items()}
        best["ours"]["speed_ratio"] = best["ours"]["tokens_per_second"] / best["peer"]["tokens_per_second"]
        best["ours"]["memory_ratio"] = best["ours"]["peak_bytes"] / best["peer"]["peak_bytes"]
        results[precision] = best
        for side, record in best.items():
            print(f"{precision} {side:5} {record['tokens_per_second']:8.0f} tokens/s  "
                  f"peak {record['peak_bytes'] / 2**30:.2f} GiB  "
                  f"state {record['state_bytes_per_parameter']:.1f} B/parameter")
        print(f"{precision} ratio {best['ours']['speed_ratio']:.2f}x tokens/s, "
              f"{best['ours']['memory_ratio']:.2f}x peak memory", flush=True)
        if options.layouts:
            for layout in ("tp2", "tp2-sp", "pp2"):
                record = measure("ours", precision, options, layout, 2)
                record["ratio_to_one_process"] = record["tokens_per_second"] / best["ours"]["tokens_per_second"]
                results[precision][layout] = record
                print(f"{precision} {layout:6} on two ranks: {record['ratio_to_one_process']:.2f}x of one process "
                      "with two threads", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
