"""Our Triton kernels of the cross-entropy against the plain formula, interpreted on the CPU, and compiled for GPUs."""

from interpreted import complete_interpreter, require_interpreter

require_interpreter()

import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import test_ops_parallel  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from ladder import REPO  # noqa: E402
from test_ops_reference import leaf  # noqa: E402

from modellink.ops import reference  # noqa: E402
from modellink.ops.cross_entropy import vocab_parallel_cross_entropy  # noqa: E402
from modellink.ops.cuda.cross_entropy import cross_entropy  # noqa: E402
from modellink.ops.forms import Situation, forms_in_use  # noqa: E402
from modellink.ops.table import choose  # noqa: E402

complete_interpreter()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOSS = {"atol": 2e-6, "rtol": 2e-6}  # of the same logits, all in fp32


def both(logits: torch.Tensor, target: torch.Tensor, real: int, slope: torch.Tensor
         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradient of the kernels, then of the formula."""
    results: list[torch.Tensor] = []
    for function in (cross_entropy, reference.vocab_parallel_cross_entropy):
        x = logits.clone().requires_grad_()
        loss = function(x * 1, target, None, real)
        (loss * slope).sum().backward()
        assert x.grad is not None
        results += [loss.detach(), x.grad]
    return results[0], results[1], results[2], results[3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "real", "edges"), [
    (1024, 1003, [0, 1002, 1001]),
    (9088, 9001, [0, 4095, 4096, 8191, 8192, 9000]),  # three blocks, and the words beside their edges
    (7, 7, [0, 6]),
])
def test_loss_and_gradient(dtype: torch.dtype, rows: int, real: int, edges: list[int]) -> None:
    """Padding rows with large logits, masked and weighted tokens, targets at the edges."""
    logits = (3 * leaf(8, 2, rows)).to(dtype).detach()
    logits[..., real:] = 60.0
    target = torch.randint(0, real, (8, 2), generator=torch.Generator().manual_seed(1))
    target.view(-1)[:len(edges)] = torch.tensor(edges)
    slope = leaf(8, 2, seed=2, dtype=torch.float32).detach()
    slope[1:3] = 0.0
    slope[4] = 1.0
    loss, grad, expected, slopes = both(logits, target, real, slope)
    torch.testing.assert_close(loss, expected, **LOSS)
    torch.testing.assert_close(grad, slopes)
    assert not grad[..., real:].any() and not grad[1:3].any() and grad[4, 0].abs().max() > 0.1


def test_large_and_excluded_logits() -> None:
    logits = torch.tensor([[[1e4, -1e4, 9e3]], [[-3e4, -3e4, -3e4]], [[float("-inf"), 2.0, 1.0]]])
    target = torch.tensor([[1], [2], [1]])
    loss, grad, expected, slopes = both(logits, target, 3, torch.tensor([[1.0], [0.0], [1.0]]))
    assert loss.isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, slopes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_seen(bad: float) -> None:
    """Also behind a mask, as in the formula: fp16 training finds overflows by them."""
    logits = leaf(3, 1, 40, dtype=torch.float16).detach()
    logits[1, 0, 7] = bad
    loss, grad, expected, slopes = both(logits, torch.tensor([[1], [2], [3]]), 37, torch.tensor([[1.0], [0.0], [1.0]]))
    assert loss[1].isnan() and grad[1, :, :37].isnan().all()
    torch.testing.assert_close(loss, expected, equal_nan=True)
    torch.testing.assert_close(grad[..., :37], slopes[..., :37], equal_nan=True)
    assert not grad[..., 37:].any()


def test_small_probabilities_of_fp16_live_until_the_loss_scale() -> None:
    logits = torch.zeros(1, 1, 64, dtype=torch.float16)
    logits[..., 5] = 19.0
    _, grad, _, slopes = both(logits, torch.tensor([[5]]), 64, torch.tensor([[65536.0]]))
    assert torch.tensor(-19.0).exp().half() == 0 < grad[0, 0, 0]
    torch.testing.assert_close(grad, slopes, atol=0.0, rtol=2e-3)


def test_what_happens_to_the_logits() -> None:
    """Kept by the forward, whose bits do not depend on a gradient; overwritten by the backward, and only once."""
    logits, target = leaf(6, 1, 90, dtype=torch.bfloat16), torch.arange(6)[:, None]
    x = logits * 1
    before = x.detach().clone()
    loss = cross_entropy(x, target, None, 88)
    with torch.no_grad():
        assert torch.equal(cross_entropy(logits.detach(), target, None, 88), loss)
    assert torch.equal(x, before)
    (grad,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    assert grad.data_ptr() == x.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss.sum(), x)


def test_no_tokens() -> None:
    x = torch.zeros(0, 1, 8, requires_grad=True)
    loss = cross_entropy(x * 1, torch.zeros(0, 1, dtype=torch.int64), None, 8)
    loss.sum().backward()
    assert loss.shape == (0, 1) and x.grad is not None and x.grad.shape == x.shape


def test_the_table_takes_it() -> None:
    logits, target = leaf(3, 1, 8, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.int64)
    with forms_in_use(choose(Situation("cuda")), "cpu"):
        loss = vocab_parallel_cross_entropy(logits * 1, target, None, 8)
    assert type(loss.grad_fn).__name__ == "_TritonCrossEntropyBackward"


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=test_ops_parallel.RANKS)
    # the second rank holds some padding, then nothing else
    found = {f"{real} {name}": pair for real in (test_ops_parallel.REAL, 5)
             for name, pair in test_ops_parallel.losses(rank, cross_entropy, real).items()}
    torch.save({name: tuple(x.detach() for x in pair) for name, pair in found.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), test_ops_parallel.RANKS)
    for rank in range(test_ops_parallel.RANKS):
        found: dict[str, Any] = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 4
        for got, expected in found.values():
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_the_kernels_compile(tmp_path: Path) -> None:
    """To machine code of Ampere, Hopper and Blackwell, by the compiler that a GPU's first step would run."""
    done = subprocess.run([sys.executable, str(REPO / "tests" / "liger" / "compiled_kernels.py")], cwd=REPO,
                          env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * 3 * 3 and all(line.endswith("spills 0") for line in lines), lines
