"""Time of every operation of modellink/ops/table.py and its share of the device's measured ceilings.

    python benchmarks/operations.py [--device cpu|cuda|npu] [--shape small|0.5b|1.8b|4b|7b] [--precision fp32|bf16]

Ceilings are measured in the same run: FLOP/s of a large matrix product in the same dtype, bytes/s of a large copy (read
and written). For each operation, in the form that the run chooses: time of forward and backward, the FLOPs of its
formulas (attention causal, nothing counted that is only computed again), the bytes of its inputs and outputs read or
written once, and the roofline share: the time that the ceilings allow, max(FLOPs / FLOP/s, bytes / bytes/s), over the
time it took. Operations without a product count no FLOPs.

On the CPU a call is timed on the clock, straight after another one: a share above 1 means that inputs and outputs came
from a cache. On an accelerator events around the call give the device's own seconds. Reading 2 GiB goes before each
call: the caches then hold none of its inputs, and the device is busy while Python launches what the events enclose.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flags import PRECISIONS, add_output, add_place, check_place, number, open_output
from shapes import NAMES, TRAINING, shape_of

from modellink.config.errors import run_command
from modellink.config.parser import Parser

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

Tensors = tuple[Any, ...]
COVER_BYTES = 2 << 30  # of an H100 0.7 ms; the largest L2 cache of a GPU is below 0.2 GiB


@dataclass(frozen=True)
class Case:
    """One pass of an operation.

    Attributes:
        run: the pass; takes no argument.
        flops: of its products.
        read, written: tensors that it has to read and to write once.
    """

    name: str
    run: Callable[[], Any]
    flops: float
    read: Tensors
    written: Tensors

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.read, *self.written))


def timed(run: Callable[[], Any], options: argparse.Namespace, device: Any) -> float:
    """Best seconds of one call: on the clock on the CPU, the device's own elsewhere."""
    if device.name != "cpu":
        import torch

        cover = torch.empty(COVER_BYTES // 4, dtype=torch.float32, device=device.current())
        return device_seconds(run, cover.sum, options.repeats, device)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    run()
    best = float("inf")
    for _ in range(options.repeats):
        device.synchronize()
        start = clock()
        run()
        device.synchronize()
        best = min(best, clock() - start)
    return best


def device_seconds(run: Callable[[], Any], cover: Callable[[], Any], repeats: int, device: Any) -> float:
    """Best seconds that an accelerator spends on one call, without the time that Python takes to launch it.

    Args:
        cover: launched before every call. It must take the device longer than Python takes to launch `run`, and leave
            nothing of the inputs in its caches; it should only read, because what it wrote into a cache would be
            written back during the call.
    """
    for _ in range(2):  # kernels are compiled and chosen, memory is taken
        run()
    device.synchronize()
    spans = []
    for _ in range(repeats):
        start, end = (device.namespace.Event(enable_timing=True) for _ in range(2))
        cover()
        start.record()
        run()
        end.record()
        spans.append((start, end))
    device.synchronize()
    return min(start.elapsed_time(end) for start, end in spans) / 1e3


def ceilings(options: argparse.Namespace, device: Any, dtype: Any) -> tuple[float, float]:
    """(FLOP/s, bytes/s) of this device."""
    import torch

    size, count = (2048, 1 << 26) if device.name == "cpu" else (8192, 1 << 30)
    a, b = (torch.randn(size, size, device=device.current()).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    flops = 2 * size**3 / timed(lambda: torch.mm(a, b, out=product), options, device)
    source = torch.ones(count, dtype=torch.uint8, device=device.current()).view(torch.float32)
    target = torch.empty_like(source)
    return flops, 2 * count / timed(lambda: target.copy_(source), options, device)


def differentiable(name: str, forward: Callable[[], Any], inputs: Tensors, flops: float, *,
                   saved: Tensors | None = None, weights: Tensors = ()) -> Iterator[Case]:
    """Forward and backward of a differentiable operation.

    Args:
        inputs: what it reads and has a gradient for.
        flops: of the forward; the backward has twice as many.
        saved: what the backward reads beside the gradient of the output (default: the inputs).
        weights: further inputs, with a gradient.
    """
    import torch

    leaves = (*inputs, *weights)
    for leaf in leaves:
        leaf.requires_grad_()
    out = forward()
    yield Case(f"{name} forward", forward, flops, leaves, (out,))
    grad = torch.ones_like(out)
    yield Case(f"{name} backward", lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), 2 * flops,
               (grad, *(leaves if saved is None else saved)), leaves)


def cases(run: Any, device: Any, options: argparse.Namespace) -> Iterator[Case]:
    """Every operation at the shapes of one layer of the model on one microbatch."""
    import torch
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from modellink.models.build import transformer_config
    from modellink.ops import adamw, attention, cross_entropy, frozen_linear, parallel_linear, rms_norm, rotary, swiglu
    from modellink.ops.forms import DTYPES

    model, dtype = run.model, DTYPES[options.precision]
    length, batch, hidden, ffn = options.seq_length, options.micro_batch, model.hidden_size, model.ffn_hidden_size
    heads, groups, size, vocab = model.num_attention_heads, model.num_query_groups, model.head_dim, model.vocab_size
    tokens = length * batch

    def make(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device.current()).to(kind)

    x, scale = make(length, batch, hidden), make(hidden)
    yield from differentiable("rms_norm", lambda: rms_norm.rms_norm(x, scale, 1e-6), (x,), 0, weights=(scale,))
    query, key, value = make(length, batch, heads, size), make(length, batch, groups, size), \
        make(length, batch, groups, size)
    table = rotary.rotary_table(length, size, model.rope_theta, dtype=dtype, device=device.current())
    yield from differentiable("rotary (queries)", lambda: rotary.apply_rotary(query, table), (query,), 0, saved=())
    gate_up = make(length, batch, 2 * ffn)
    yield from differentiable("swiglu", lambda: swiglu.swiglu(gate_up), (gate_up,), 0)
    context = make(length, batch, heads * size)
    yield from differentiable("attention", lambda: attention.attention(query, key, value), (query, key, value),
                              2.0 * tokens * length * heads * size, saved=(query, key, value, context))
    one = make(batch, heads, 1, size)
    keys, values = make(batch, groups, length, size), make(batch, groups, length, size)
    with torch.no_grad():
        yield Case("cached_attention (one token)", lambda: attention.attend_rows(one, keys, values, None),
                   4.0 * tokens * heads * size, (one, keys, values), (one,))
        weight, few = make(2 * ffn, hidden), make(batch, hidden)
        product = frozen_linear.frozen_linear(weight, None)
        yield Case("frozen_linear (MLP, up, one token)", lambda: product(few), 4.0 * batch * hidden * ffn,
                   (few, weight), (make(batch, 2 * ffn),))
    logits, target = make(length, batch, vocab), torch.randint(0, vocab, (length, batch), device=device.current())
    logits.requires_grad_()

    def loss_and_gradient() -> None:  # the gradient lies in the storage of the logits: a graph is good for one backward
        torch.autograd.grad(cross_entropy.vocab_parallel_cross_entropy(logits, target, None, vocab).sum(), logits)

    yield Case("cross_entropy, both ways", loss_and_gradient, 0, (logits,), (logits,))
    total = make(2 * ffn, hidden, kind=torch.float32)
    main, mean, square = (torch.rand_like(total) for _ in range(3))
    yield Case("adamw", lambda: adamw.adamw([main], [total], [mean], [square], step=9, lr=1e-4, betas=(0.9, 0.95),
                                            eps=1e-8, weight_decay=0.1),
               0, (main, total, mean, square), (main, mean, square))
    rows, grad = x.detach().view(tokens, hidden), make(tokens, 2 * ffn)
    with torch.no_grad():
        accumulate = (parallel_linear.accumulate_weight_gradient
                      if parallel_linear.accumulates_weight_gradients(device.name)
                      else lambda rows, grad, total: total.add_(grad.t() @ rows))
        yield Case("weight_gradient (MLP, up)", lambda: accumulate(rows, grad, total),
                   4.0 * tokens * hidden * ffn, (rows, grad, total), (total,))
    config = transformer_config(run, device.name)
    common: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": True}
    column = ColumnParallelLinear(hidden, 2 * ffn, gather_output=False, **common).to(device.current())
    yield from differentiable("column_linear (MLP, up)", lambda: column(x)[0], (x,), 4.0 * tokens * hidden * ffn,
                              weights=(column.weight,))
    row, narrow = RowParallelLinear(ffn, hidden, input_is_parallel=True, **common).to(device.current()), \
        make(length, batch, ffn)
    yield from differentiable("row_linear (MLP, down)", lambda: row(narrow)[0], (narrow,), 2.0 * tokens * hidden * ffn,
                              weights=(row.weight,))


def start_run(options: argparse.Namespace) -> tuple[Any, Any]:
    """A run of one rank with its forms in use."""
    from modellink.config.settings import parse_settings
    from modellink.runtime import prepare_run
    from modellink.start import start

    config = shape_of(options.shape, TRAINING, layers=1, positions=options.seq_length)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        run = prepare_run(parse_settings("operations", "", [
            "--model", folder, "--mock-data", "--seq-length", str(options.seq_length), "--train-iters", "1",
            "--lr", "1e-4", "--micro-batch-size", str(options.micro_batch), f"--{options.precision}",
            "--device", options.device]), 1, "train")
    device = start(run)
    from modellink.models.forms import choose_forms

    choose_forms(run, device)
    return run, device


def make_parser() -> Parser:
    parser = Parser(prog="operations.py", description="Every operation against the ceilings of the device.")
    add_place(parser)
    parser.add_argument("--shape", default="small", choices=NAMES, help="small (512 wide), or a size of Qwen1.5")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this precision (default: both)")
    parser.add_argument("--seq-length", type=number, default=512, help="tokens a sample")
    parser.add_argument("--micro-batch", type=number, default=2, help="samples")
    parser.add_argument("--repeats", type=number, default=5, help="calls after the warm-up; the best counts")
    add_output(parser, "operations.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    check_place(options)
    open_output(options.output)
    wanted, found = [options.precision] if options.precision else list(PRECISIONS), {}
    for options.precision in wanted:
        run, device = start_run(options)
        from modellink.models.forms import situation_of
        from modellink.ops.forms import DTYPES
        from modellink.ops.table import describe

        flops, rate = ceilings(options, device, DTYPES[options.precision])
        print("\n".join(describe(situation_of(run, device))))
        print(f"{options.precision} on {device.product_name()}: ceilings {flops / 1e12:.3f} TFLOP/s, "
              f"{rate / 1e9:.1f} GB/s\n"
              f"{'operation':32} {'ms':>9} {'GFLOP':>9} {'MB':>9} {'TFLOP/s':>9} {'GB/s':>8} {'share':>7}")
        records = []
        for case in cases(run, device, options):
            seconds = timed(case.run, options, device)
            share = max(case.flops / flops, case.bytes / rate) / seconds
            records.append({"operation": case.name, "seconds": seconds, "flops": case.flops, "bytes": case.bytes,
                            "roofline_share": share})
            print(f"{case.name:32} {1e3 * seconds:9.3f} {case.flops / 1e9:9.2f} {case.bytes / 1e6:9.1f} "
                  f"{case.flops / seconds / 1e12:9.3f} {case.bytes / seconds / 1e9:8.1f} {share:7.2f}", flush=True)
        found[options.precision] = {"ceiling_flops": flops, "ceiling_bytes": rate, "operations": records}
    options.output.write_text(json.dumps({"device": device.product_name(), "shape": options.shape, **found},
                                         indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
