"""The forms for the CPU against plain formulas, at sizes where they work in parts."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ops import explicit_attention, leaf
from torch.nn.functional import cross_entropy, linear, silu
from torch.utils._python_dispatch import TorchDispatchMode

from modellink.ops import reference
from modellink.ops.cpu import attention as cpu_attention
from modellink.ops.cpu import linear as cpu_linear
from modellink.ops.cpu import rms_norm as cpu_rms_norm
from modellink.ops.cpu import workspace
from modellink.ops.cross_entropy import cpu_cross_entropy, torch_cross_entropy, vocab_parallel_cross_entropy
from modellink.ops.embedding import embedding
from modellink.ops.forms import Choice, Form, Situation, forms_in_use
from modellink.ops.gradients import multi_tensor_norm, multi_tensor_scale
from modellink.ops.parallel_linear import accumulate_weight_gradient, torch_accumulate
from modellink.ops.swiglu import swiglu
from modellink.ops.table import TABLE, choose

ACCUMULATES = [Choice("weight_gradient", Form("portable", torch_accumulate))]


def narrow(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return leaf(*shape, dtype=dtype, seed=seed)


@pytest.mark.parametrize("length", [1, 64, 65, 200])
@pytest.mark.parametrize("groups", [6, 2])
def test_tiled_attention_is_causal_softmax(length: int, groups: int) -> None:
    query, key = narrow(length, 2, 6, 8), narrow(length, 2, groups, 8, seed=1)
    value = narrow(length, 2, groups, 24, seed=2)[..., 16:]  # a part of a wider row, as the model has it
    got, expected = cpu_attention.attention(query, key, value), explicit_attention(query, key, value)
    assert got.grad_fn is not None and "Tiled" in type(got.grad_fn).__name__
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    for a, b in zip(torch.autograd.grad((got * weight).sum(), (query, key, value)),
                    torch.autograd.grad((expected * weight).sum(), (query, key, value))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_tiled_attention_of_packed_samples() -> None:
    query, key, value = (narrow(150, 1, 4, 8, seed=seed) for seed in range(3))
    bounds = [0, 70, 71, 150]
    got = cpu_attention.attention(query, key, value, scale=0.3, cu_seqlens=bounds)
    expected = reference.attention(query, key, value, scale=0.3, cu_seqlens=bounds)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_tiled_attention_with_scores_beyond_the_range_of_exp() -> None:
    """Places above the diagonal may have any score: they must not become inf x 0."""
    query, key, value = (400 * narrow(70, 1, 2, 8, seed=seed) for seed in range(3))
    out = cpu_attention.attention(query, key, value)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(x.isfinite().all() for x in (out, *grads))
    torch.testing.assert_close(out, explicit_attention(query, key, value), rtol=1e-4, atol=1e-4)


def test_tiled_attention_in_bf16_rounds_once() -> None:
    query, key, value = (narrow(100, 2, 4, 16, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    got, expected = cpu_attention.attention(query, key, value), explicit_attention(*wide)
    torch.testing.assert_close(got, expected.bfloat16(), atol=1e-6, rtol=2**-7)
    for a, b in zip(torch.autograd.grad(got.float().square().sum(), (query, key, value)),
                    torch.autograd.grad(expected.square().sum(), wide)):
        torch.testing.assert_close(a.double(), b, atol=2e-2 * float(b.abs().max()), rtol=0)


def test_long_samples_take_torchs_kernel() -> None:
    long = narrow(cpu_attention.LONGEST + 1, 1, 1, 8)
    out = cpu_attention.attention(long, long, long)
    assert "Tiled" not in repr(out.grad_fn)
    torch.testing.assert_close(out, explicit_attention(long, long, long), atol=1e-5, rtol=1e-5)


def test_recomputed_attention_is_that_of_the_first_pass() -> None:
    query, key, value = (narrow(70, 1, 4, 8, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    with torch.no_grad():
        first = cpu_attention.attention(query, key, value)
    assert torch.equal(first, cpu_attention.attention(query, key, value))


@pytest.mark.parametrize(("rows", "real"), [(37, 37), (40, 37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_with_its_derivative_beside_it(rows: int, real: int, dtype: torch.dtype) -> None:
    """Weighted and masked tokens, more of them than one chunk; padding rows enter neither loss nor gradient."""
    base = (4 * leaf(21, 2, rows).detach()).to(dtype)
    target = torch.randint(0, real, (21, 2), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(21, 2, generator=torch.Generator().manual_seed(2))
    weight[3], weight[7:] = 0.0, 1.0
    ours, theirs = base.clone().requires_grad_(), base.clone().requires_grad_()
    loss = cpu_cross_entropy(ours * 1, target, None, real)
    expected = cross_entropy(theirs[..., :real].flatten(0, 1).float(), target.flatten(), reduction="none").view(21, 2)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward(weight)
    expected.backward(weight)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (ours.grad[..., real:] == 0).all() and (ours.grad[3] == 0).all()


def test_cross_entropy_of_large_logits_and_without_gradient() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]]).requires_grad_()
    loss = cpu_cross_entropy(logits * 1, torch.tensor([[1]]), None, 3)
    assert loss.item() == pytest.approx(2e4)
    kept, target = narrow(50, 1, 9), torch.zeros(50, 1, dtype=torch.long)
    before = kept.detach().clone()
    frozen = cpu_cross_entropy(kept.detach(), target, None, 9)
    assert torch.equal(kept, before)  # an evaluation leaves the logits alone
    torch.testing.assert_close(frozen, torch_cross_entropy(before.clone(), target, None, 9))
    # at the first step of a preference the model is its reference: the difference is 0 and no rounding
    assert torch.equal(frozen, cpu_cross_entropy(kept * 1, target, None, 9))


def test_a_frozen_linear_equals_one_that_learns() -> None:
    x, weight = narrow(7, 2, 24), narrow(40, 24, seed=1)
    frozen, learning = (cpu_linear.linear(x, w, None, True) for w in (weight.detach(), weight))
    assert torch.equal(frozen, learning)
    (grad,) = torch.autograd.grad(frozen.sum(), x)
    torch.testing.assert_close(grad, weight.detach().sum(0).expand(7, 2, 24), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [cpu_linear.linear, reference.linear])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(form: Any, has_bias: bool) -> None:
    x, weight, bias = narrow(7, 2, 24), narrow(40, 24, seed=1), narrow(40, seed=2) if has_bias else None
    got, expected = form(x, weight, bias, False), linear(x, weight, bias)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    leaves = [x, weight] + ([bias] if bias is not None else [])
    slope = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    for a, b in zip(torch.autograd.grad(got, leaves, slope), torch.autograd.grad(expected, leaves, slope)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def parameter(*shape: int, seed: int, tied: bool = False) -> Any:
    weight: Any = torch.nn.Parameter(narrow(*shape, seed=seed).detach())
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(shape), False
    weight.zero_out_wgrad = tied
    return weight


@pytest.mark.parametrize("form", [cpu_linear.linear, reference.linear])
@pytest.mark.parametrize("tied", [True, False])
def test_linear_adds_to_the_main_gradient(form: Any, tied: bool) -> None:
    x, weight = narrow(7, 2, 24), parameter(40, 24, seed=1, tied=tied)
    out = form(x, weight, None, True)
    out.backward(torch.ones_like(out))
    expected = 1 + x.detach().flatten(0, 1).sum(0).expand(40, 24)
    torch.testing.assert_close(weight.main_grad, expected, atol=1e-5, rtol=1e-5)
    assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
    if tied:  # the embedding's gradient is added to this one
        assert (weight.grad == 0).all()


def test_embedding_adds_its_rows_to_the_main_gradient() -> None:
    weight, ids = parameter(9, 4, seed=1), torch.tensor([[2, 5], [2, 8]])
    with forms_in_use(ACCUMULATES, "cpu"):
        out = embedding(ids, weight)
        out.backward(torch.ones_like(out))
    torch.testing.assert_close(out, weight[ids])
    expected = torch.ones(9, 4)
    expected[2] += 2
    expected[[5, 8]] += 1
    assert torch.equal(weight.main_grad, expected) and weight.grad_added_to_main_grad
    # a weight without a main gradient, or a run that does not accumulate: autograd's own
    assert "_Embedding" not in type(embedding(ids, weight).grad_fn).__name__
    with forms_in_use(ACCUMULATES, "cpu"):
        assert "_Embedding" not in type(embedding(ids, narrow(9, 4)).grad_fn).__name__


def test_weight_gradient_in_more_than_one_part() -> None:
    x, grad = narrow(6, 4096).detach().bfloat16(), narrow(6, 1100, seed=1).detach().bfloat16()
    total, expected = torch.ones(1100, 4096), torch.ones(1100, 4096)
    torch_accumulate(x, grad, total)
    expected += (grad.t() @ x).float()
    torch.testing.assert_close(total, expected, atol=0.05, rtol=0.01)  # products in bf16


def test_swiglu_in_more_than_one_part() -> None:
    x = narrow(100, 2, 4096)
    gate, up = x.chunk(2, dim=-1)
    got, expected = swiglu(x), silu(gate) * up
    torch.testing.assert_close(got, expected)
    slope = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(torch.autograd.grad(got, x, slope), torch.autograd.grad(expected, x, slope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_in_more_than_one_part(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rms_norm, "_CACHED_ELEMENTS", 1 << 13)
    x, weight = narrow(90, 2, 256, dtype=dtype), narrow(256, seed=1, dtype=dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    got, expected = cpu_rms_norm.rms_norm(x, weight, 1e-5), reference.rms_norm(*wide, 1e-5)
    assert "_RMSNorm" in type(got.grad_fn).__name__ and got.dtype == dtype
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]  # relative, once
    slope = torch.randn(got.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    pairs = [(got, expected), *zip(torch.autograd.grad(got, (x, weight), slope),
                                   torch.autograd.grad(expected, wide, slope.double()))]
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=2e-6 * float(b.abs().max()))
    assert "_RMSNorm" not in type(cpu_rms_norm.rms_norm(narrow(2, 1, 256), narrow(256), 1e-5).grad_fn).__name__


def test_large_outputs_of_linear_use_their_memory_again() -> None:
    x, weight, bias = narrow(600, 2, 8), narrow(7100, 8, seed=1), narrow(7100, seed=2)
    out = cpu_linear.linear(x, weight, bias, False)
    place, kept = out.data_ptr(), out.detach()[5:6]
    assert place % 64 == 0 and not out._is_view()
    torch.testing.assert_close(out, linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    del out
    beside = cpu_linear.linear(x, weight, None, False)  # a part of the first output still lives
    assert beside.data_ptr() != place
    torch.testing.assert_close(kept, linear(x[5:6], weight, bias), atol=1e-5, rtol=1e-5)
    second = beside.data_ptr()
    del beside, kept
    assert cpu_linear.linear(x[:595], weight, None, False).data_ptr() in (place, second)
    workspace.empty((1 << 24,))
    assert [block.nbytes for block in workspace._free] == [(1 << 26) + 64]  # smaller ones are given up


def test_norm_and_scale_of_all_gradients() -> None:
    tensors = [torch.full((4,), 3.0), torch.full((2, 2), 4.0)]
    norm, _ = multi_tensor_norm(0, torch.zeros(1), [tensors], False)
    assert norm.shape == (1,) and norm.item() == pytest.approx(10.0)
    multi_tensor_scale(0, torch.zeros(1), [tensors, tensors], 0.5)
    assert [t.flatten()[0].item() for t in tensors] == [1.5, 2.0]
    other = [torch.empty_like(t) for t in tensors]
    multi_tensor_scale(0, torch.zeros(1), [tensors, other], 2.0)
    assert [t.flatten()[0].item() for t in other] == [3.0, 4.0] and tensors[0][0] == 1.5


def test_freed_memory_is_kept() -> None:
    """A second set of tensors takes the pages of the first."""
    script = ("import resource, torch\n"
              "from modellink.device.cpu import CpuDevice\n"
              "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
              "def use():\n"
              "    before = faults(); [torch.ones(1 << 22) for _ in range(6)]; return faults() - before\n"
              "print(use(), use())\n"
              "CpuDevice().set_current(0)\n"
              "print(use(), use(), use())\n")  # the heap may grow twice
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    given_back, *_, kept = (int(word) for word in done.stdout.split()[1:])
    assert given_back > 6000 and kept < given_back / 2


class Names(TorchDispatchMode):
    """The aten operators that run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_lines_of_a_log_say_what_runs(dtype: torch.dtype) -> None:
    """Where the derivative of the loss is made, and how a weight gradient is added, by dtype."""
    choices = choose(Situation("cpu", dtype=dtype))
    lines = {choice.operation: str(choice) for choice in choices}
    with forms_in_use(choices, "cpu"):
        loss = vocab_parallel_cross_entropy(narrow(4, 1, 9, dtype=dtype) * 1, torch.zeros(4, 1, dtype=torch.long), None,
                                            9)
        with Names() as names:
            accumulate_weight_gradient(torch.ones(4, 3, dtype=dtype), torch.ones(4, 5, dtype=dtype), torch.zeros(5, 3))
    is_beside = "OneRank" in repr(loss.grad_fn)
    assert is_beside == (dtype != torch.float16)
    assert lines["cross_entropy"] == ("cross_entropy: chunks of tokens, derivative beside the loss" if is_beside else
                                      "cross_entropy: chunks of tokens, vocabulary parallel, gradient in place (not "
                                      "chunks of tokens, derivative beside the loss: float16 needs the loss scale "
                                      "before it)")
    is_inside = "aten::addmm_" in names.found
    assert is_inside == (dtype == torch.float32) and ("aten::mm" in names.found) == (not is_inside)
    added = "weight_gradient: added to the main gradient {} the product"
    assert lines["weight_gradient"].startswith(added.format("inside" if is_inside else "behind"))


def test_the_line_of_a_split_vocabulary() -> None:
    lines = [str(choice) for choice in choose(Situation("cpu", tensor=2)) if choice.operation == "cross_entropy"]
    assert lines == ["cross_entropy: chunks of tokens, vocabulary parallel, gradient in place (not chunks of tokens, "
                     "derivative beside the loss: the vocabulary is split over tensor parallel ranks)"]


def test_what_a_cpu_run_uses() -> None:
    forms = {choice.operation: choice.form for choice in choose(Situation("cpu", dtype=torch.float32))}
    assert forms["attention"].run is cpu_attention.attention and forms["weight_gradient"].run is torch_accumulate
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert (forms["linear"].run is cpu_linear.linear) == has_avx512
    parallel = SimpleNamespace(dtype=torch.float32, tensor=2)
    assert cpu_linear.problem(parallel) == "megatron-core's layers communicate"  # type: ignore[arg-type]
    assert cpu_linear.problem(Situation("cpu")) is not None  # bf16 goes to oneDNN by itself
    assert all(form.run is None or form.devices == ("cpu",) for form in TABLE["linear"][:-1])
