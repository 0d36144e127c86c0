"""Operations that span two ranks, against the same formula on the whole tensors in one process."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modellink.ops import reference
from modellink.ops.cross_entropy import vocab_parallel_cross_entropy

RANKS = 2
LENGTH, BATCH, INNER = 6, 2, 512  # INNER / RANKS is the narrowest product that MC2 takes
ROWS, REAL = 7, 11  # vocabulary rows of a rank; the last three are padding


def tensor(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def own(whole: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    return whole.chunk(RANKS, dim)[rank].clone().requires_grad_()


def linears(rank: int, dtype: torch.dtype, column: Any, row: Any, accumulate: bool = False, frozen: bool = False
            ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(got, expected) of values and gradients of both layers on one rank; main gradients of weights start at 1, frozen
    ones get none."""
    group, found = dist.group.WORLD, {}
    for kind, function in (("column", column), ("row", row)):
        x = tensor(LENGTH, BATCH, INNER, seed=1, dtype=dtype)
        weight = tensor(INNER, INNER, seed=2, dtype=dtype) / 16
        slope = tensor(LENGTH, BATCH, 2 * INNER, seed=3, dtype=dtype)[..., :INNER]  # rows that lie apart
        whole_x, whole_weight = (each.to(torch.float64, copy=True).requires_grad_() for each in (x, weight))
        (torch.nn.functional.linear(whole_x, whole_weight) * slope.double()).sum().backward()
        assert whole_x.grad is not None and whole_weight.grad is not None
        in_dim, weight_dim, out_dim = (0, 0, 2) if kind == "column" else (2, 1, 0)
        own_x, own_weight = own(x, rank, in_dim), own(weight, rank, weight_dim)
        main: Any = own_weight.requires_grad_(not frozen)
        main.main_grad = torch.ones_like(weight.chunk(RANKS, weight_dim)[rank])
        out = function(own_x, own_weight, group, accumulate)
        out.backward(slope.chunk(RANKS, out_dim)[rank])
        expected = torch.nn.functional.linear(whole_x, whole_weight).chunk(RANKS, out_dim)[rank]
        found[f"{kind} value"] = out, expected
        found[f"{kind} input"] = own_x.grad, whole_x.grad.chunk(RANKS, in_dim)[rank]
        if frozen:
            assert main.grad is None
            continue
        assert hasattr(main, "grad_added_to_main_grad") == accumulate
        got = main.main_grad - 1 if accumulate else main.grad
        found[f"{kind} weight"] = got, whole_weight.grad.chunk(RANKS, weight_dim)[rank]
    return found


def losses(rank: int, function: Any, real: int = REAL) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    logits = 3 * tensor(LENGTH, BATCH, RANKS * ROWS, seed=4, dtype=torch.float32)
    target = torch.randint(0, real, (LENGTH, BATCH), generator=torch.Generator().manual_seed(5))
    slope = tensor(LENGTH, BATCH, seed=6, dtype=torch.float32)
    whole = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(whole[..., :real].flatten(0, 1), target.flatten(), reduction="none")
    (expected.view_as(slope) * slope).sum().backward()
    assert whole.grad is not None
    part = own(logits, rank, 2)
    loss = function(part * 1, target, dist.group.WORLD, real)
    (loss * slope).sum().backward()
    return {"loss": (loss, expected.view_as(slope)), "slope": (part.grad, whole.grad.chunk(RANKS, 2)[rank])}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    import npu_contracts
    from symmetric_memory import symmetric_memory_on_cpu
    from torch.distributed._symmetric_memory import _test_mode

    from modellink.ops.cuda import symmetric_linear
    from modellink.ops.npu import parallel_linear

    npu_contracts.COMMUNICATORS["two"] = dist.group.WORLD
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for accumulate in (False, True):
        found |= {f"reference {'added ' * accumulate}{name}": pair for name, pair in linears(
            rank, torch.float64, reference.column_linear, reference.row_linear, accumulate).items()}

    column, row = parallel_linear.column_linear, parallel_linear.row_linear
    with (npu_contracts.contracts() as operators,
          patch.object(parallel_linear, "communicator", lambda group: "two")):
        found |= {f"mc2 {name}": pair for name, pair in linears(rank, torch.bfloat16, column, row).items()}
        with npu_contracts.every_dtype():
            for accumulate in (False, True):
                found |= {f"mc2 fp64 {'added ' * accumulate}{name}": pair for name, pair in linears(
                    rank, torch.float64, column, row, accumulate).items()}
        factors = tensor(4, 256, seed=7 + rank, dtype=torch.bfloat16), tensor(256, 3, seed=9, dtype=torch.bfloat16)
        for operator in (operators.npu_all_gather_base_mm, operators.npu_mm_reduce_scatter_base):
            torch.library.opcheck(operator.default, (*factors, "two", RANKS), test_utils="test_schema")
    column, row = symmetric_linear.column_linear, symmetric_linear.row_linear
    with symmetric_memory_on_cpu(Path(folder)) as called:
        found |= {f"symmetric {name}": pair for name, pair in linears(rank, torch.bfloat16, column, row).items()}
        for accumulate in (False, True):
            found |= {f"symmetric fp64 {'added ' * accumulate}{name}": pair for name, pair in linears(
                rank, torch.float64, column, row, accumulate).items()}
        found |= {f"symmetric fp64 frozen {name}": pair for name, pair in linears(
            rank, torch.float64, column, row, frozen=True).items()}
        assert called == ["fused_all_gather_matmul", "fused_matmul_reduce_scatter", "fused_all_gather_matmul"] * 4
        with _test_mode():
            found |= {f"symmetric fallback {name}": pair for name, pair in linears(
                rank, torch.float64, column, row).items()}
    found |= {f"reference {name}": pair for name, pair in losses(
        rank, reference.vocab_parallel_cross_entropy).items()}
    found |= {f"chunked {name}": pair for name, pair in losses(rank, vocab_parallel_cross_entropy).items()}
    torch.save({name: tuple(x.detach() for x in pair) for name, pair in found.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (str(folder),), RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("part", ["value", "input", "weight"])
@pytest.mark.parametrize(("form", "tolerance"), [
    ("reference", 1e-10), ("reference added", 1e-10), ("mc2", 4e-2), ("mc2 fp64", 1e-10), ("mc2 fp64 added", 1e-10),
    ("symmetric", 4e-2), ("symmetric fp64", 1e-10), ("symmetric fp64 added", 1e-10), ("symmetric fallback", 1e-10)])
def test_linear(form: str, tolerance: float, part: str, kind: str, results: list[dict[str, Any]]) -> None:
    for found in results:
        got, expected = found[f"{form} {kind} {part}"]
        torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance)
        assert expected.abs().max() > 1


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_frozen_layer_over_symmetric_memory(kind: str, results: list[dict[str, Any]]) -> None:
    for found in results:
        assert f"symmetric fp64 frozen {kind} weight" not in found
        for part in ("value", "input"):
            got, expected = found[f"symmetric fp64 frozen {kind} {part}"]
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_cross_entropy(form: str, results: list[dict[str, Any]]) -> None:
    """The last rank holds padding rows."""
    for found in results:
        for part in ("loss", "slope"):
            got, expected = found[f"{form} {part}"]
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
