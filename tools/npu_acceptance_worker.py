"""The parts of npu_acceptance.py that need the device in their own process: operators and collectives.

`python npu_acceptance_worker.py --part operators --file ROWS.jsonl --device npu`, collectives under a launcher; rank 0
writes ROWS.jsonl, a row as soon as it is known, so that those before a break are kept.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from npu_acceptance_rows import Failure, Row  # noqa: E402

from modellink.config.errors import ConfigError, run_command  # noqa: E402
from modellink.config.fields import flag  # noqa: E402
from modellink.config.parser import parse_sections  # noqa: E402
from modellink.parallel.rank import Rank  # noqa: E402

# largest difference over the largest expected value; some roundings of a dtype, not a vendor's promise
OPERATOR_LIMITS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
REPEATS = 5
CACHED = (41, 20)  # tokens of two rows of a cache


@dataclass(frozen=True)
class Options:
    """One part of the acceptance."""

    part: str = flag("operators", "what to compare", choices=["operators", "collectives"])
    file: str = flag("rows.jsonl", "where the rows go")
    device: str = flag("npu", "device to look at", choices=["npu", "cuda", "cpu"])
    megabytes: int = flag(64, "size of the tensor whose collectives are timed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the part and write its rows."""
    (options,), _ = parse_sections("npu_acceptance_worker.py", "A part of npu_acceptance.py.", (Options,), argv)
    rows = {"operators": operator_rows, "collectives": collective_rows}[options.part](options)
    path = options.file if Rank.from_environment().rank == 0 else os.devnull
    with open(path, "w", encoding="utf-8", buffering=1) as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")
    return 0


def operator_rows(options: Options) -> Iterator[Row]:
    """Values and gradients of every operation in the form the device gets, against the formulas in fp64."""
    from modellink.device.select import select_device
    from modellink.ops.forms import DTYPES, Situation, use_forms
    from modellink.ops.table import choose

    device = select_device(options.device)
    place = device.set_current(0)
    works = device_failure(place) is None
    for precision, limit in OPERATOR_LIMITS.items():
        choices = choose(Situation(device.name, device.product_name(), DTYPES[precision],
                                   wishes=frozenset({"gradient_accumulation_fusion"})))
        use_forms(choices, place.type)
        forms = {choice.operation: choice.form.name for choice in choices}
        for case in operator_cases():
            name = f"{case.operation} {case.name} {precision}: {forms[case.operation].split(' (')[0]}"
            print(name, flush=True)  # a kernel may take the process with it: then the log ends here
            try:
                row = Row("operators", name, compare(case, DTYPES[precision], place), "of the largest", limit)
            # a kernel that refuses, that this library does not have, or that our own limits rule out
            except (RuntimeError, AttributeError, ConfigError) as error:
                row = Row.broken("operators", name, Failure.of(error))
            yield row
            # a fault of a kernel can end the device's context: all that follows would fail for it
            lost = device_failure(place) if works and row.failure is not None else None
            if lost is not None:
                yield Row.broken("operators", f"the rest of the part, device lost after {case.operation} {case.name} "
                                              f"{precision}", lost)
                return


def device_failure(place: Any) -> Failure | None:
    """Why an addition on the device fails; None when it gives the right sum."""
    import torch

    try:
        total = float((torch.ones(2, device=place) + 1).cpu().sum())
    except RuntimeError as error:
        return Failure.of(error)
    return None if total == 4 else Failure("wrong sum", f"1 + 1, twice, gives {total:g} in all")


def compare(case: "Case", dtype: Any, place: Any) -> float:
    """The difference of values, and of gradients where there are any."""
    import torch

    rounded = [tensor.to(kept or dtype) for tensor, kept in zip(case.inputs, case.dtypes, strict=True)]
    near = [tensor.to(place).requires_grad_(case.differentiable) for tensor in rounded]
    far = [tensor.double().requires_grad_(case.differentiable) for tensor in rounded]
    got, expected = case.ours(*near), case.theirs(*far)
    pairs = [(got, expected)]
    if case.differentiable:
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(got.dtype)
        pairs += list(zip(torch.autograd.grad((got * weight.to(place)).sum(), near),
                          torch.autograd.grad((expected * weight.double()).sum(), far), strict=True))
    return difference(pairs)


def difference(pairs: list[tuple[Any, Any]]) -> float:
    """The largest difference of tensors, as a part of the largest expected value; nan counts as infinite."""
    found = [float((got.detach().cpu().double() - expected.detach()).abs().max() / expected.detach().abs().max())
             for got, expected in pairs]
    return max(value if value == value else float("inf") for value in found)


@dataclass(frozen=True)
class Case:
    """One comparison: `ours` on the device, `theirs` in fp64, on the same inputs.

    Attributes:
        dtypes: of the inputs on the device; None is the precision under test.
    """

    operation: str
    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    inputs: list[Any]
    differentiable: bool = True
    kept: tuple[Any, ...] = ()

    @property
    def dtypes(self) -> tuple[Any, ...]:
        return self.kept or (None,) * len(self.inputs)


def operator_cases() -> Iterator[Case]:
    import torch

    from modellink.ops import attention, reference
    from modellink.ops.adamw import adamw
    from modellink.ops.cross_entropy import vocab_parallel_cross_entropy
    from modellink.ops.parallel_linear import accumulate_weight_gradient
    from modellink.ops.rms_norm import rms_norm
    from modellink.ops.rotary import apply_rotary, rotary_table
    from modellink.ops.swiglu import swiglu

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return apply_rotary(x, rotary_table(x.shape[0], x.shape[-1], 1e6, dtype=x.dtype).to(x.device))

    def formula(x: torch.Tensor) -> torch.Tensor:
        cos, sin, _ = rotary_table(x.shape[0], x.shape[-1], 1e6, dtype=x.dtype)[:, :, None, None]
        return reference.rotate(x, cos, sin)

    def stepped(form: Callable[..., Any]) -> Callable[..., Any]:
        def step(*tensors: torch.Tensor) -> torch.Tensor:
            copies = [tensor.clone() for tensor in tensors]
            form(*([copy] for copy in copies), step=3, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
            return torch.cat(copies)

        return step

    def summed(form: Callable[..., Any]) -> Callable[..., Any]:
        def add(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
            form(x, grad, sum_of := total.clone())
            return sum_of

        return add

    yield Case("rms_norm", "[128, 2, 4096]", lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: reference.rms_norm(
        x, w, 1e-6), [draw(128, 2, 4096), draw(4096)])
    yield Case("rotary", "SBND", rotated, formula, [draw(128, 2, 8, 128)])
    yield Case("swiglu", "[128, 2, 1024]", swiglu, reference.swiglu, [draw(128, 2, 1024)])
    targets = torch.randint(0, 1000, (128, 2), generator=generator)
    yield Case("cross_entropy", "[128, 2, 1024], 1000 words",
               lambda x: vocab_parallel_cross_entropy(x * 1, targets.to(x.device), None, 1000),
               lambda x: reference.vocab_parallel_cross_entropy(x, targets, None, 1000), [4 * draw(128, 2, 1024)])
    states = [draw(4096), draw(4096), 0.1 * draw(4096), 0.1 * draw(4096).square()]
    yield Case("adamw", "4096 fp32 parameters beside", stepped(adamw), stepped(reference.adamw), states,
               differentiable=False, kept=(torch.float32,) * 4)
    yield Case("weight_gradient", "[256, 512]' [256, 384]", summed(accumulate_weight_gradient),
               summed(reference.accumulate_weight_gradient), [draw(256, 384), draw(256, 512), draw(512, 384)],
               differentiable=False, kept=(None, None, torch.float32))
    for groups in (8, 2):
        heads = [draw(128, 2, 8, 128), draw(128, 2, groups, 128), draw(128, 2, groups, 128)]
        yield Case("attention", f"SBH {groups} groups", attention.attention, reference.attention, heads)
        packed = [tensor[:, :1] for tensor in heads]
        ends = {"cu_seqlens": [0, 37, 100, 128]}
        yield Case("attention", f"TND {groups} groups", lambda *x, ends=ends: attention.attention(*x, **ends),
                   lambda *x, ends=ends: reference.attention(*x, **ends), packed)
        for queries in (1, 128):
            rows = [draw(2, 8, queries, 128), draw(2, groups, 128, 128), draw(2, groups, 128, 128)]
            yield Case("cached_attention", f"BNSD {groups} groups, {queries} new",
                       lambda q, k, v: attention.attend_rows(q, k, v, None),
                       lambda q, k, v: reference.attend_rows(q, k, v, None), rows, differentiable=False)
    # more tokens than the 2048 of the compressed mask; rows of a cache that have different lengths; an offset
    long = [draw(2304, 1, heads, 128) for heads in (2, 1, 1)]
    yield Case("attention", "SBH 2304 tokens", attention.attention, reference.attention, long)
    rows = [draw(2, 8, 1, 128), draw(2, 2, 96, 128), draw(2, 2, 96, 128)]
    seen = (torch.arange(96) < torch.tensor([41, 96])[:, None])[:, None, None]
    offset = attention.lower_right(16, 96, torch.device("cpu"))
    for name, mask, queries in (("rows of 41 and 96", seen, 1), ("16 new behind 80", offset, 16)):
        yield Case("cached_attention", name,
                   lambda q, k, v, mask=mask: attention.attend_rows(q, k, v, mask.to(q.device)),
                   lambda q, k, v, mask=mask: reference.attend_rows(q, k, v, mask),
                   [draw(2, 8, queries, 128), *rows[1:]], differentiable=False)
    # as the engine calls it: whole rows of a cache that have room for more, and so many tokens of each
    for name, mask, queries, stops in (("a step at 41 and 96", seen, 1, [41, 96]),
                                       ("16 new up to 96", offset, 16, [96]), ("a prompt of 96", None, 96, [96])):
        rows = [draw(len(stops), 8, queries, 128), *(draw(len(stops), 2, 128, 128) for _ in range(2))]
        ours, theirs = (partial(attend_ends, each.attend_rows, mask, stops) for each in (attention, reference))
        yield Case("cached_attention", f"{name} in rows of 128", ours, theirs, rows, differentiable=False)
    for size, count, groups in ((64, 8, 2), (80, 4, 2), (128, 8, 1)):
        tokens = sum(CACHED)
        yield Case("cached_attention", f"rows of a cache, {count} heads of {size}, {groups} groups", through_a_cache,
                   each_row, [draw(tokens, heads, size) for heads in (count, groups, groups)], differentiable=False)


def attend_ends(form: Callable[..., Any], mask: Any, ends: list[int], query: Any, key: Any, value: Any) -> Any:
    """A form of `attend_rows` with the lengths of the rows, on the device and on the host."""
    import torch

    from modellink.ops.attention import RowLengths

    lengths = RowLengths(torch.tensor(ends, dtype=torch.int32, device=query.device), max(ends), ends)
    return form(query, key, value, None if mask is None else mask.to(query.device), lengths=lengths)


def through_a_cache(query: Any, key: Any, value: Any) -> Any:
    """[tokens, heads or groups, head size] -> [tokens, heads * head size]: two prompts of different lengths in one
    pass, more tokens behind the first, then steps of both, over parts of a cache that has room for more."""
    import torch

    from modellink.inference.cache import KVCache, Piece

    groups, size = key.shape[1:]
    cache = KVCache([1], 3, 64, groups, size, dtype=query.dtype, device=query.device)
    passes = [[(0, CACHED[0] - 16), (1, CACHED[1] - 3)], [(0, 13)], *[[(0, 1), (1, 1)]] * 3]
    out = query.new_empty(len(query), query.shape[1] * size)
    for counts in passes:
        pieces = [Piece(row, len(cache.tokens[row]), [0] * count) for row, count in counts]
        places = torch.cat([torch.arange(piece.start, piece.start + len(piece.tokens)) + sum(CACHED[:piece.row])
                            for piece in pieces]).to(query.device)
        cache.begin(pieces)
        cache.place()
        out[places] = cache.attend(1, query[places], key[places], value[places])
        cache.end()
    return out


def each_row(query: Any, key: Any, value: Any) -> Any:
    """What `through_a_cache` should give: every row by itself, all of its tokens at once."""
    import torch

    from modellink.ops import reference

    rows = zip(*(tensor[:, None].split(CACHED) for tensor in (query, key, value)), strict=True)
    return torch.cat([reference.attention(*row)[:, 0] for row in rows])


def collective_rows(options: Options) -> Iterator[Row]:
    """Every collective that training uses: right numbers, and the speed of a large one."""
    import torch
    import torch.distributed as dist

    from modellink.device.select import select_device
    from modellink.parallel.dims import ParallelDims
    from modellink.parallel.groups import start_groups, stop_groups
    from modellink.start import prepare_core

    device = select_device(options.device)
    prepare_core(device)
    size = Rank.from_environment().world_size
    dims = ParallelDims.from_world_size(size, tensor=size, pipeline=1, num_layers=1, layers_per_chunk=None,
                                        sequence_parallel=False)
    start_groups(device, dims, 10)
    rank, place = dist.get_rank(), device.current()
    count = options.megabytes * 2**20 // 4 // size * size
    own = torch.full((count,), rank + 1.0, device=place)
    summed, told, got = own.clone(), own.clone(), torch.empty_like(own)
    part, whole = torch.empty(count // size, device=place), torch.empty(count * size, device=place)
    total, before = size * (size + 1) / 2, float((rank - 1) % size + 1)
    everyone = torch.arange(1, size + 1).float().repeat_interleave(count)

    def exchange() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, own, (rank + 1) % size),
                                            dist.P2POp(dist.irecv, got, (rank - 1) % size)]):
            work.wait()

    cases: dict[str, tuple[Callable[[], Any], torch.Tensor, Any]] = {
        "all_reduce": (lambda: dist.all_reduce(summed), summed, total),
        "all_gather": (lambda: dist.all_gather_into_tensor(whole, own), whole, everyone),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, own), part, total),
        "broadcast": (lambda: dist.broadcast(told, 0), told, 1.0),
        "ring of messages": (exchange, got, before),
    }
    for name, (call, result, expected) in cases.items():
        print(name, flush=True)
        call()
        error = (result.cpu() - expected).abs().max().to(place)
        dist.all_reduce(error, dist.ReduceOp.MAX)
        device.synchronize()
        begin = time.perf_counter()
        for _ in range(REPEATS):
            call()
        device.synchronize()
        seconds = (time.perf_counter() - begin) / REPEATS
        yield Row("collectives", f"{name}, {size} ranks", float(error), "difference", 0.0)
        yield Row("collectives", f"{name}, {size} ranks, {options.megabytes} MiB each", count * 4 / seconds / 1e9,
                  "GB/s a rank")
    yield from linear_rows(device, size, rank)
    stop_groups()


def linear_rows(device: Any, size: int, rank: int) -> Iterator[Row]:
    """MC2: products with their communication, values and gradients, where the forms of this device have them."""
    import torch
    import torch.distributed as dist

    from modellink.ops import parallel_linear
    from modellink.ops.forms import DTYPES, Situation, use_forms
    from modellink.ops.table import choose

    length, width = 32 * size, 256 * size
    for precision in ("bf16", "fp16"):
        dtype = DTYPES[precision]
        choices = choose(Situation(device.name, device.product_name(), dtype, widths=(width // size, width),
                                   tensor=size, is_sequence_parallel=True, wishes=frozenset({"use_mc2"})))
        use_forms(choices, device.name)
        for kind, in_dim, weight_dim, out_dim in (("column_linear", 0, 0, 2), ("row_linear", 2, 1, 0)):
            choice = next(choice for choice in choices if choice.operation == kind)
            if choice.form.run is None:
                reason = next((why for form, why in choice.passed if form.startswith("MC2")),
                              "no such form on this device")
                yield Row("collectives", f"{kind} {precision}: left out, {reason}", None, "")
                continue
            print(kind, precision, flush=True)
            generator = torch.Generator().manual_seed(4)
            whole = [torch.randn(*shape, generator=generator).to(dtype) for shape in (
                (length, 2, width), (width, width), (length, 2, width))]
            own = [tensor.chunk(size, dim)[rank].contiguous().to(device.current()) for tensor, dim in zip(
                whole, (in_dim, weight_dim, out_dim), strict=True)]
            near, far = ([tensor.requires_grad_() for tensor in tensors[:2]] for tensors in (
                own, [tensor.double() for tensor in whole]))
            got = getattr(parallel_linear, kind)(*near, dist.group.WORLD)
            expected = torch.nn.functional.linear(*far)
            parts = zip([got, *torch.autograd.grad(got, near, own[2])],
                        [expected, *torch.autograd.grad(expected, far, whole[2].double())],
                        (out_dim, in_dim, weight_dim), strict=True)
            error = torch.tensor(difference([(a, b.chunk(size, dim)[rank]) for a, b, dim in parts]),
                                 device=device.current())
            dist.all_reduce(error, dist.ReduceOp.MAX)
            yield Row("collectives", f"{kind} {precision}, {size} ranks: {choice.form.name}", float(error),
                      "of the largest", OPERATOR_LIMITS[precision])


if __name__ == "__main__":
    sys.exit(run_command(main))
