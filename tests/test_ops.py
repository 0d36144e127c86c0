"""Operations against plain formulas, forward and backward."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from modellink.ops.adamw import FusedAdamW
from modellink.ops.attention import attention
from modellink.ops.cross_entropy import vocab_parallel_cross_entropy
from modellink.ops.rms_norm import rms_norm
from modellink.ops.rotary import apply_rotary, rotary_table
from modellink.ops.swiglu import swiglu


def leaf(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def test_swiglu_is_silu_times_up_with_its_gradient() -> None:
    x = leaf(3, 5, 14)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_rms_norm_equals_transformers() -> None:
    norm = Qwen2RMSNorm(24, eps=1e-5).double()
    x = leaf(4, 2, 24)
    with torch.no_grad():
        norm.weight.copy_(leaf(24, seed=1))
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight
    torch.testing.assert_close(rms_norm(x, norm.weight, 1e-5), expected)
    single = x.detach().float()
    torch.testing.assert_close(rms_norm(single, norm.weight.float(), 1e-5), norm.float()(single), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("base", [1e6, 5e6])
def test_rotary_equals_transformers(base: float) -> None:
    length, batch, heads, size = 33, 2, 3, 16
    x = leaf(length, batch, heads, size, dtype=torch.float32)
    inverse = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    angles = torch.cat((angles, angles), dim=-1)[None]
    query = x.permute(1, 2, 0, 3)
    expected, _ = apply_rotary_pos_emb(query, query, angles.cos(), angles.sin())
    got = apply_rotary(x, rotary_table(length, size, base, dtype=torch.float32))
    torch.testing.assert_close(got, expected.permute(2, 0, 1, 3), atol=1e-6, rtol=1e-6)


def test_rotary_table() -> None:
    """Both halves of a row are the same numbers, as forms that read the first half alone expect."""
    table = rotary_table(7, 24, 1e4, dtype=torch.bfloat16, offset=2)
    assert table.shape == (3, 7, 24) and torch.equal(table[..., :12], table[..., 12:])
    assert torch.equal(table[2], -table[1]) and table[1].any()


def test_rotary_gradient() -> None:
    table = rotary_table(5, 8, 1e4, dtype=torch.float64, offset=3)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, table), (leaf(5, 2, 3, 8),))


def explicit_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(QK')V with a written-out mask, [s, b, h, d] each."""
    repeat = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / query.shape[-1] ** 0.5
    rows, columns = scores.shape[-2:]
    allowed = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 6), (3, 8)])
@pytest.mark.parametrize("groups", [6, 2])
def test_attention_is_causal_softmax(queries: int, keys: int, groups: int) -> None:
    """A whole sample, a decode step, and several tokens at an offset against a cache."""
    query, key, value = leaf(queries, 2, 6, 8), leaf(keys, 2, groups, 8, seed=1), leaf(keys, 2, groups, 8, seed=2)
    got, expected = attention(query, key, value), explicit_attention(query, key, value)
    torch.testing.assert_close(got, expected)
    weight = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(3))
    for a, b in zip(torch.autograd.grad((got * weight).sum(), (query, key, value)),
                    torch.autograd.grad((expected * weight).sum(), (query, key, value))):
        torch.testing.assert_close(a, b)


def test_packed_samples_do_not_see_each_other() -> None:
    query, key, value = leaf(10, 1, 4, 8), leaf(10, 1, 2, 8, seed=1), leaf(10, 1, 2, 8, seed=2)
    got = attention(query, key, value, cu_seqlens=[0, 4, 5, 10])
    expected = torch.cat([explicit_attention(query[a:b], key[a:b], value[a:b]) for a, b in ((0, 4), (4, 5), (5, 10))])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("rows", "real"), [(37, 37), (40, 37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_equals_torch(rows: int, real: int, dtype: torch.dtype) -> None:
    """Also over more tokens than one chunk; padding rows enter neither loss nor gradient."""
    base = (4 * leaf(21, 2, rows).detach()).to(dtype)
    target = torch.randint(0, real, (21, 2), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(21, 2, generator=torch.Generator().manual_seed(2))
    ours, theirs = base.clone().requires_grad_(), base.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(ours * 1, target, None, real)
    expected = cross_entropy(theirs[..., :real].flatten(0, 1).float(), target.flatten(), reduction="none").view(21, 2)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    loss.backward(weight)
    expected.backward(weight)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert (ours.grad[..., real:] == 0).all()


def test_cross_entropy_of_large_logits_is_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]]).requires_grad_()
    loss = vocab_parallel_cross_entropy(logits * 1, torch.tensor([[1]]), None, 3)
    assert loss.item() == pytest.approx(2e4)


def test_adamw_equals_torch_and_counts_steps_in_the_group() -> None:
    ours = [torch.nn.Parameter(leaf(n, dtype=torch.float32, seed=n).detach()) for n in (5, 64)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = FusedAdamW([{"params": ours}, {"params": []}], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    other = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert [group["step"] for group in mine.param_groups] == [20, 20]
    assert set(mine.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}
