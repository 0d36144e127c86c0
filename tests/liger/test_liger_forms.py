"""liger-kernel's kernels in our CUDA forms against the plain formulas, forward and backward, interpreted on the CPU."""

from interpreted import complete_interpreter, require_interpreter

require_interpreter()

import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from ladder import REPO  # noqa: E402
from test_ops_reference import assert_same, leaf  # noqa: E402
from tiny import save_tiny  # noqa: E402

from modellink.ops import reference  # noqa: E402
from modellink.ops.cuda import pointwise  # noqa: E402
from modellink.ops.cuda.library import liger_missing  # noqa: E402
from modellink.ops.forms import Situation, forms_in_use  # noqa: E402
from modellink.ops.rms_norm import rms_norm  # noqa: E402
from modellink.ops.rotary import apply_rotary, rotary_table  # noqa: E402
from modellink.ops.swiglu import swiglu  # noqa: E402
from modellink.ops.table import choose  # noqa: E402

complete_interpreter()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: {"atol": 2e-6, "rtol": 2e-5}, torch.bfloat16: {"atol": 4e-2, "rtol": 2e-2},
         torch.float16: {"atol": 5e-3, "rtol": 3e-3}}


def test_the_table_takes_them() -> None:
    assert liger_missing() is None
    got = {choice.operation: choice.form.run for choice in choose(Situation("cuda"))}
    assert (got["rms_norm"], got["rotary"], got["swiglu"]) == (pointwise.rms_norm, pointwise.rotate, pointwise.swiglu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 2, 24), (3, 96), (4, 1, 1000)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Also of widths that are no powers of two, and of a small input, where eps counts."""
    x, weight = leaf(*shape, dtype=dtype), leaf(shape[-1], seed=1, dtype=dtype)
    assert_same(lambda x, w: pointwise.rms_norm(x, w, 1e-6), lambda x, w: reference.rms_norm(x, w, 1e-6), x, weight,
                **CLOSE[dtype])
    small = (x.detach() * 1e-2).requires_grad_()
    assert_same(lambda x, w: pointwise.rms_norm(x, w, 1e-3), lambda x, w: reference.rms_norm(x, w, 1e-3), small, weight,
                atol=CLOSE[dtype]["atol"] * 100, rtol=CLOSE[dtype]["rtol"])


def test_rms_norm_of_bf16_rounds_once() -> None:
    """Everything in fp32, as our formula: another casting mode would round the normalised input before the weight."""
    x, weight = leaf(16, 64, dtype=torch.bfloat16), leaf(64, seed=1, dtype=torch.bfloat16)
    got, expected = pointwise.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
    assert (got != expected).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 8), (3, 24)])
def test_rotary(dtype: torch.dtype, batch: int, rows: int, heads: int, head_dim: int) -> None:
    """One table for the batch and one a row, at an offset; a table that is a view; heads that are no power of two."""
    length = 6
    table = rotary_table(length + 5, head_dim, 1e4, dtype=dtype, offset=2)
    places = torch.arange(length)[:, None] + 2 * torch.arange(rows)
    table = table[:, places]
    cos, sin, _ = table[:, :, :, None]
    x = leaf(length, batch, heads, head_dim, dtype=dtype)
    before = x.detach().clone()
    with forms_in_use(choose(Situation("cuda")), "cpu"):
        assert_same(lambda x: apply_rotary(x, table), lambda x: reference.rotate(x, cos, sin), x, **CLOSE[dtype])
    assert torch.equal(x, before)
    # a view of a larger tensor, as in generation
    wide = leaf(length, batch, heads + 2, head_dim, dtype=dtype).detach()
    copy = wide.clone()
    torch.testing.assert_close(pointwise.rotate(wide[:, :, :heads], cos, sin),
                               reference.rotate(copy[:, :, :heads], cos, sin), **CLOSE[dtype])
    assert torch.equal(wide, copy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 2, 28), (7, 200), (3, 1, 2, 10)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = leaf(*shape, dtype=dtype)
    assert_same(pointwise.swiglu, reference.swiglu, x, **CLOSE[dtype])


def test_gradients_of_others_are_left_alone() -> None:
    """Two nodes hold the same gradient tensor: neither kernel may write into it."""
    x, weight = leaf(4, 16, dtype=torch.float32), leaf(16, seed=1, dtype=torch.float32)
    (x * 1 + pointwise.rms_norm(x, weight, 1e-6)).backward(torch.ones(4, 16))
    got = x.grad
    x.grad = None
    (x * 1 + reference.rms_norm(x, weight, 1e-6)).backward(torch.ones(4, 16))
    torch.testing.assert_close(got, x.grad)
    # and twice over the same activations
    y = pointwise.swiglu(x)
    first, = torch.autograd.grad(y.sum(), x, retain_graph=True)
    second, = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)


def test_operations_dispatch_to_them() -> None:
    x, weight = leaf(3, 2, 8, dtype=torch.float32), leaf(8, seed=1, dtype=torch.float32)
    with forms_in_use(choose(Situation("cuda")), "cpu"):
        nodes = [rms_norm(x, weight, 1e-6).grad_fn, swiglu(x).grad_fn.next_functions[0][0]]
    names = [type(node).__name__ for node in nodes]
    assert names == ["LigerRMSNormFunctionBackward", "LigerFusedGateUpSiLUMulFunctionBackward"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, three steps, in the forms of a GPU and in those of the CPU, in fp32 and bf16."""
    folder = tmp_path_factory.mktemp("trained")
    save_tiny(folder / "weights", num_hidden_layers=2, num_key_value_heads=2)
    done = subprocess.run([sys.executable, str(REPO / "tests" / "liger" / "cuda_forms.py"), str(folder)], cwd=REPO,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "losses.json").read_text())


def test_training_gives_the_same_losses(trained: dict[str, Any]) -> None:
    names = trained["cuda_forms"]
    assert names["rms_norm"] == "RMSNorm of liger-kernel"
    assert names["swiglu"] == "SwiGLU of liger-kernel" and names["rotary"] == "rotary of liger-kernel"
    assert names["cross_entropy"].startswith("Triton, one pass over the logits")
    assert len(trained["cuda"]) == 3
    assert trained["cuda"] == pytest.approx(trained["cpu"], abs=1e-5)
    assert trained["cuda_norms"] == pytest.approx(trained["cpu_norms"], rel=1e-5)


def test_bf16_training_is_near_and_adds_weight_gradients_in_fp32(trained: dict[str, Any]) -> None:
    """Rounding differs between forms; every linear layer and the head adds its gradient in one product."""
    assert trained["cuda-bf16_forms"]["weight_gradient"].startswith("addmm of 16-bit factors")
    assert trained["cuda-bf16"] == pytest.approx(trained["cpu-bf16"], abs=1e-2)
    assert trained["cuda-bf16_norms"] == pytest.approx(trained["cpu-bf16_norms"], rel=1e-2)
    assert trained["cuda-bf16_sums"] == 3 * (2 * 4 + 1) and trained["cuda_sums"] == trained["cpu-bf16_sums"] == 0
