"""The references against transformers' formulas and numerical derivatives, and every portable form against them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2RMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from modellink.checks.wishes import KERNELS
from modellink.ops import reference
from modellink.ops.adamw import FusedAdamW
from modellink.ops.attention import attend_rows, attention, lower_right, torch_attend_rows
from modellink.ops.cross_entropy import vocab_parallel_cross_entropy
from modellink.ops.forms import Choice, Form, Situation, form_of, forms_in_use
from modellink.ops.parallel_linear import torch_accumulate
from modellink.ops.rms_norm import rms_norm
from modellink.ops.rotary import apply_rotary, rotary_table, torch_rotate
from modellink.ops.swiglu import swiglu
from modellink.ops.table import TABLE, choose, describe


def leaf(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def assert_same(ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor], *inputs: torch.Tensor,
                **tolerance: float) -> None:
    """Values and gradients of two functions of the same tensors."""
    got, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(got, expected, **tolerance)
    weight = leaf(*got.shape, seed=99).detach().to(got.dtype)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), inputs),
                    torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_rms_norm() -> None:
    norm = Qwen2RMSNorm(24, eps=1e-5)
    x, weight = leaf(4, 2, 24, dtype=torch.float32), leaf(24, seed=1, dtype=torch.float32)

    def theirs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert_same(lambda x, w: reference.rms_norm(x, w, 1e-5), theirs, x, weight, atol=1e-5, rtol=1e-5)
    assert_same(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5),
                x.double().detach().requires_grad_(), weight.double().detach().requires_grad_())
    assert gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-5), (leaf(3, 2, 6), leaf(6, seed=1)))


def test_rotation() -> None:
    length, size = 7, 8
    x = leaf(length, 2, 3, size)
    table = rotary_table(length, size, 1e4, dtype=torch.float64, offset=2)
    cos, sin, _ = table[:, :, None, None]
    whole_cos, whole_sin = cos[None, :, 0, 0], sin[None, :, 0, 0]

    def theirs(x: torch.Tensor) -> torch.Tensor:
        query = x.permute(1, 2, 0, 3)
        return apply_rotary_pos_emb(query, query, whole_cos, whole_sin)[0].permute(2, 0, 1, 3)

    assert_same(lambda x: reference.rotate(x, cos, sin), theirs, x)
    assert_same(lambda x: apply_rotary(x, table), lambda x: reference.rotate(x, cos, sin), x)
    assert gradcheck(lambda x: reference.rotate(x, cos, sin), (x,))


def test_swiglu() -> None:
    x = leaf(3, 5, 14)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    assert_same(reference.swiglu, theirs, x)
    assert_same(swiglu, reference.swiglu, x)
    assert gradcheck(reference.swiglu, (leaf(2, 3, 6),))


def attention_inputs(queries: int, keys: int, groups: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    return (leaf(queries, batch, 6, 8), leaf(keys, batch, groups, 8, seed=1), leaf(keys, batch, groups, 8, seed=2))


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 6), (3, 8)])
@pytest.mark.parametrize("groups", [6, 2])
def test_attention(queries: int, keys: int, groups: int) -> None:
    """Causal, a step of decoding, several tokens at an offset; also with grouped queries."""
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.training = 6 // groups, True
    mask = torch.full((queries, keys), float("-inf"), dtype=torch.float64).triu(keys - queries + 1)

    def theirs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out, _ = eager_attention_forward(module, q, k, v, mask, scaling=8**-0.5)  # softmax in fp32
        return out.flatten(2).transpose(0, 1).to(query.dtype)

    inputs = attention_inputs(queries, keys, groups)
    assert_same(reference.attention, theirs, *inputs, atol=1e-6, rtol=1e-5)
    assert_same(attention, reference.attention, *inputs)
    assert gradcheck(reference.attention, inputs)


def test_packed_attention_is_that_of_each_sample() -> None:
    inputs, ends = attention_inputs(9, 9, 2, batch=1), [0, 4, 5, 5, 9]

    def apart(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([reference.attention(*(x[a:b] for x in inputs)) for a, b in ((0, 4), (4, 5), (5, 9))])

    assert_same(lambda *x: reference.attention(*x, cu_seqlens=ends), apart, *inputs)
    assert_same(lambda *x: attention(*x, cu_seqlens=ends), apart, *inputs)
    assert gradcheck(lambda *x: reference.attention(*x, cu_seqlens=ends), inputs)


def test_attention_over_rows_of_a_cache() -> None:
    query, key, value = (leaf(2, heads, length, 8, seed=heads) for heads, length in ((4, 3), (2, 6), (2, 6)))
    mask = torch.tensor([[True, True, False, True, False, False], [True, True, True, True, True, False],
                         [True, False, False, False, False, True]])
    for seen in (mask, lower_right(3, 6, query.device)):
        torch.testing.assert_close(attend_rows(query, key, value, seen),
                                   reference.attend_rows(query, key, value, seen))


@pytest.mark.parametrize("real", [7, 5])
def test_cross_entropy(real: int) -> None:
    logits, target = leaf(5, 2, 7), torch.randint(0, real, (5, 2), generator=torch.Generator().manual_seed(1))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return reference.vocab_parallel_cross_entropy(x, target, None, real)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        flat = x[..., :real].flatten(0, 1)
        return torch.nn.functional.cross_entropy(flat, target.flatten(), reduction="none").view(5, 2)

    assert_same(ours, theirs, logits)
    assert gradcheck(ours, (logits,))
    single = logits.detach().float().requires_grad_()
    assert_same(lambda x: vocab_parallel_cross_entropy(x * 1, target, None, real), ours, single, atol=1e-6, rtol=1e-5)


def test_adamw() -> None:
    """The written-out steps against torch's kernel, through the optimizer that training uses."""
    forms = [Choice("adamw", Form("plain", reference.adamw))]
    ours, theirs = (torch.nn.Parameter(leaf(33, dtype=torch.float64).detach()) for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    mine, other = FusedAdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(10):
        ours.grad = leaf(33, seed=step).detach()
        theirs.grad = ours.grad.clone()
        with forms_in_use(forms, "cpu"):
            mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs)


def test_weight_gradient() -> None:
    x, grad = leaf(11, 5).detach(), leaf(11, 3, seed=1).detach()
    start = leaf(3, 5, seed=2).detach()
    for accumulate in (torch_accumulate, reference.accumulate_weight_gradient):
        total = start.clone()
        accumulate(x, grad, total)
        torch.testing.assert_close(total, start + grad.t() @ x)
    total = start.float()
    torch_accumulate(x.bfloat16(), grad.bfloat16(), total)
    expected = start.float()
    reference.accumulate_weight_gradient(x.bfloat16(), grad.bfloat16(), expected)
    torch.testing.assert_close(total, expected, atol=2e-2, rtol=1e-2)  # the product was rounded to bf16


def test_forms_follow_the_device_of_the_tensors() -> None:
    """Forms chosen for another device leave tensors on the CPU alone."""
    marker = Choice("rotary", Form("marker", lambda *tensors: "marker"))
    with forms_in_use([marker], "npu"):
        assert form_of("rotary", "cpu", torch_rotate) is torch_rotate
        assert form_of("rotary", "npu", torch_rotate)() == "marker"
    assert form_of("rotary", "npu", torch_rotate) is torch_rotate


def test_swiglu_of_a_transposed_input() -> None:
    x = leaf(3, 4, 6).detach().transpose(0, 1).requires_grad_()
    assert_same(swiglu, reference.swiglu, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_without_gradient_leaves_its_logits(dtype: torch.dtype) -> None:
    logits, target = leaf(3, 2, 16, dtype=dtype), torch.randint(0, 16, (3, 2))
    before = logits.detach().clone()
    with torch.no_grad(), forms_in_use(choose(Situation("cpu", dtype=dtype)), "cpu"):
        got = vocab_parallel_cross_entropy(logits, target, None, 16)
    assert torch.equal(logits, before)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(
        before.float().flatten(0, 1), target.flatten(), reduction="none").view(3, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_with_frozen_weights(has_bias: bool, dtype: torch.dtype) -> None:
    weight, bias = leaf(48, 40, dtype=dtype).detach(), leaf(48, dtype=dtype, seed=1).detach() if has_bias else None
    packed, portable, plain = (form.run(weight, bias) for form in TABLE["frozen_linear"])  # type: ignore[misc]
    exact = reference.frozen_linear(weight.double(), None if bias is None else bias.double())
    for rows in (1, 3, 4, 33):
        x = leaf(rows, 40, dtype=dtype, seed=rows).detach()
        want = exact(x.double())
        for product in (packed, portable, plain):
            got = product(x)
            assert got.shape == (rows, 48) and got.dtype is dtype
            # fp32: sums of 40 products; bf16: one rounding of the result
            torch.testing.assert_close(got.double(), want, atol=1e-5 if dtype is torch.float32 else 1e-2,
                                       rtol=1e-5 if dtype is torch.float32 else 2 ** -8)
    weight.zero_()  # packed once
    assert packed(x).abs().max() > 1 and (bias is not None or portable(x).abs().max() == 0)


def test_which_weights_are_packed() -> None:
    assert names(Situation("cpu", dtype=torch.float32))["frozen_linear"] == "oneDNN, weight packed once"
    (line,) = (line for line in describe(Situation("cpu", dtype=torch.float16)) if "frozen_linear" in line)
    assert line.endswith("torch linear (not oneDNN, weight packed once: for float32 and bfloat16)")
    assert names(Situation("cuda"))["frozen_linear"] == "torch linear"


def test_every_operation_ends_in_its_reference() -> None:
    for operation, forms in TABLE.items():
        assert forms[-1].run is not None and forms[-1].run.__module__ == reference.__name__, operation
        assert not forms[-1].devices and forms[-1].why_not(Situation("cpu")) is None


def names(situation: Situation) -> dict[str, str]:
    return {choice.operation: choice.form.name for choice in choose(situation)}


def test_a_choice_says_why_faster_forms_do_not_run() -> None:
    lines = "\n".join(describe(Situation("npu", "Ascend910B2", torch.float32, head_dim=1024)))
    assert "rms_norm: npu_rms_norm" in lines
    assert ("attention: torch scaled_dot_product_attention (not npu_fusion_attention (SBH, packed TND, compressed "
            "causal mask): it takes head sizes up to 768 and not 1024)") in lines
    assert "not npu_rotary_mul: it takes even head sizes below 896 and not 1024" in lines
    assert "not MC2, npu_all_gather_base_mm: --use-mc2 is off" in lines
    assert "not npu_matmul_add_fp32 of mindspeed: --use-mindspeed-ops is off" in lines
    assert "  mindspeed: not installed; used: npu_matmul_add_fp32, only with --use-mindspeed-ops" in lines
    assert "  apex: not installed; used: nothing of it" in lines
    assert "apex" not in "\n".join(describe(Situation("cpu")))


def test_the_whole_npu_row_for_bf16() -> None:
    got = names(Situation("npu", "Ascend910B2", tensor=8, is_sequence_parallel=True, wishes=frozenset({"use_mc2"})))
    assert got["attention"].startswith("npu_fusion_attention")
    assert got["cached_attention"].startswith("npu_fused_infer_attention_score")
    assert (got["rms_norm"], got["rotary"], got["swiglu"]) == ("npu_rms_norm", "npu_rotary_mul", "npu_swiglu")
    assert got["column_linear"].startswith("MC2") and got["row_linear"].startswith("MC2")
    assert got["weight_gradient"] == "a gradient of its own, added by megatron-core"


@pytest.mark.parametrize(("changes", "reason"), [
    ({"tensor": 3}, "it takes 2, 4, 8, 16 tensor parallel ranks and not 3"),
    ({"tensor": 16, "product": "Ascend910B2"}, "it takes 2, 4, 8 tensor parallel ranks and not 16"),
    ({"product": "Ascend950DT"}, "it is documented for Atlas A2, Atlas A3 and not for Ascend950DT"),
    ({"is_sequence_parallel": False}, "it needs --sequence-parallel"),
    ({"has_adapters": True}, "layers with LoRA adapters have no such form"),
    ({"widths": (4096, 128)}, "it takes products over 256 to 65534 features and not over 128"),
    ({"dtype": torch.float32}, "it takes float16, bfloat16 and not float32"),
])
def test_why_mc2_does_not_run(changes: dict[str, Any], reason: str) -> None:
    values: dict[str, Any] = {"tensor": 2, "is_sequence_parallel": True, "wishes": frozenset({"use_mc2"}), **changes}
    choice = next(c for c in choose(Situation("npu", **values)) if c.operation == "column_linear")
    assert choice.form.run is None and reason in str(choice)


def test_mc2_over_16_ranks_is_for_atlas_a3() -> None:
    for product, is_fused in (("Ascend910_9392", True), ("Ascend910B2", False)):
        got = names(Situation("npu", product, tensor=16, is_sequence_parallel=True, wishes=frozenset({"use_mc2"})))
        assert got["column_linear"].startswith("MC2") == got["row_linear"].startswith("MC2") == is_fused


def test_a_product_that_the_pages_do_not_name_gets_the_portable_forms() -> None:
    got = names(Situation("npu", "Ascend910A", tensor=2, is_sequence_parallel=True, wishes=frozenset({
        "use_mc2", "gradient_accumulation_fusion"})))
    assert {operation for operation, name in got.items() if "npu_" in name} == {"rms_norm"}  # its page names none
    reason = "not npu_swiglu: it is documented for Atlas A2, Atlas A3, Ascend 950 and not for Ascend910A"
    assert reason in "\n".join(describe(Situation("npu", "Ascend910A")))


@pytest.mark.parametrize(("changes", "reason"), [
    ({"head_dim": 72}, "it takes head sizes that are multiples of 16 and not 72"),
    ({"heads": 130, "groups": 2}, "it takes up to 64 heads to a key/value group and not 130 heads with 2 groups")])
def test_what_attention_over_a_cache_does_not_take(changes: dict[str, Any], reason: str) -> None:
    (choice,) = [c for c in choose(Situation("npu", **changes)) if c.operation == "cached_attention"]
    assert choice.form.run is torch_attend_rows and reason in str(choice)
    assert names(Situation("npu", **changes))["attention"].startswith("npu_fusion_attention")


def test_mindspeed_is_asked_for_and_missing() -> None:
    wishes = frozenset({"use_mindspeed_ops", "gradient_accumulation_fusion"})
    choice = next(c for c in choose(Situation("npu", "Ascend910B2", wishes=wishes)) if c.operation == "weight_gradient")
    assert choice.form.run is torch_accumulate
    assert "not npu_matmul_add_fp32 of mindspeed: mindspeed is not installed" in str(choice)


@pytest.mark.parametrize(("wish", "operation"), [
    ("use_flash_attn", "attention"), ("use_fused_rmsnorm", "rms_norm"), ("use_fused_rotary_pos_emb", "rotary"),
    ("use_fused_swiglu", "swiglu"), ("use_mc2", "column_linear"), ("use_symm_mem", "row_linear"),
    ("gradient_accumulation_fusion", "weight_gradient")])
def test_notices_and_table_know_the_same_devices(wish: str, operation: str) -> None:
    """A wish has an effect on the NPU where the table has a form for it, and on the CPU only the weight gradient.

    Other forms for the CPU are no fused kernels that somebody could wish for: they run in any case.
    """
    for device in ("cpu", "npu"):
        situation = Situation(device, tensor=2, is_sequence_parallel=True, wishes=frozenset({wish}))
        form = next(choice for choice in choose(situation) if choice.operation == operation).form
        is_special = form.devices == ("npu",) or form.run is torch_accumulate
        assert is_special == (device in KERNELS[wish][0])
