"""The NPU forms on the CPU, over operator contracts: numbers against the references, keywords, limits, a model."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from npu_contracts import CALLED, contracts, every_dtype
from test_ops_reference import assert_same, leaf
from torch.autograd import gradcheck

import modellink.ops.npu
from modellink.config import ConfigError
from modellink.inference.cache import KVCache, Piece
from modellink.ops import reference
from modellink.ops.attention import RowLengths, attend_rows, lower_right
from modellink.ops.cuda import attention as cuda_attention
from modellink.ops.forms import Situation, forms_in_use
from modellink.ops.npu import attention as npu_attention
from modellink.ops.npu import limits, pointwise
from modellink.ops.npu import parallel_linear as npu_linear
from modellink.ops.npu.calls import CALLS
from modellink.ops.npu.library import compressed_mask
from modellink.ops.rms_norm import rms_norm
from modellink.ops.rotary import apply_rotary, rotary_table
from modellink.ops.swiglu import swiglu
from modellink.ops.table import choose

FP32, BF16 = torch.float32, torch.bfloat16
CLOSE = {FP32: {"atol": 2e-6, "rtol": 2e-5}, BF16: {"atol": 4e-2, "rtol": 4e-2}}


@pytest.fixture(scope="module")
def operators() -> Iterator[Any]:
    with contracts() as operators:
        yield operators


@pytest.fixture
def npu_forms(operators: Any) -> Iterator[None]:
    """Operations on CPU tensors run in the forms that an NPU would get."""
    with forms_in_use(choose(Situation("npu", "Ascend910B2")), "cpu"):
        yield


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rms_norm(npu_forms: None, dtype: torch.dtype) -> None:
    x, weight = leaf(5, 2, 24, dtype=dtype), leaf(24, seed=1, dtype=dtype)
    assert "RMSNormBackward" in type(rms_norm(x, weight, 1e-6).grad_fn).__name__
    assert_same(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), x, weight,
                **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotation(npu_forms: None, dtype: torch.dtype, per_row: bool) -> None:
    """Layouts S11D, and SB1D for rows at their own positions."""
    x, table = leaf(6, 2, 3, 8, dtype=dtype), rotary_table(9, 8, 1e4, dtype=dtype)
    table = table[:, torch.tensor([[0, 3], [1, 4], [2, 5], [3, 6], [4, 7], [5, 8]])] if per_row else table[:, :6]
    cos, sin, _ = table[:, :, :, None] if per_row else table[:, :, None, None]
    assert_same(lambda x: apply_rotary(x, table), lambda x: reference.rotate(x, cos, sin), x, **CLOSE[dtype])


def test_rotation_reads_the_table_as_it_lies(operators: Any, npu_forms: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer and its backward the operator gets contiguous parts of the table itself: none is made for it."""
    seen: list[tuple[tuple[int, ...], bool, int]] = []

    def record(x: Any, *parts: Any) -> Any:
        seen.extend((tuple(part.shape), part.is_contiguous(), part.untyped_storage().data_ptr()) for part in parts)
        return operators.npu_rotary_mul(x, *parts)

    monkeypatch.setattr(sys.modules["torch_npu"], "npu_rotary_mul", record)
    table = rotary_table(9, 8, 1e4, dtype=FP32)
    for _ in range(2):  # layers
        apply_rotary(leaf(6, 2, 3, 8, dtype=FP32), table[:, :6]).sum().backward()
    assert seen == [((6, 1, 1, 8), True, table.untyped_storage().data_ptr())] * 8


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_swiglu(npu_forms: None, dtype: torch.dtype) -> None:
    x = leaf(5, 2, 24, dtype=dtype)
    assert_same(swiglu, reference.swiglu, x, **CLOSE[dtype])
    assert_same(lambda x: swiglu(x[..., ::2]), lambda x: reference.swiglu(x[..., ::2]), x, **CLOSE[dtype])


def heads(queries: int, keys: int, groups: int, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (leaf(queries, batch, 6, 8, dtype=dtype), leaf(keys, batch, groups, 8, seed=1, dtype=dtype),
            leaf(keys, batch, groups, 8, seed=2, dtype=dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 6), (3, 8)])
@pytest.mark.parametrize("groups", [6, 2])
def test_attention(operators: Any, dtype: torch.dtype, queries: int, keys: int, groups: int) -> None:
    assert_same(npu_attention.attention, reference.attention, *heads(queries, keys, groups, 2, dtype), **CLOSE[dtype])
    assert_same(lambda *x: npu_attention.attention(*x, scale=0.5), lambda *x: reference.attention(*x, scale=0.5),
                *heads(queries, keys, groups, 2, FP32), **CLOSE[FP32])


@pytest.mark.parametrize("ends", [[0, 10], [0, 4, 5, 10], [0, 0, 4, 4, 10, 10]])
def test_packed_attention(operators: Any, ends: list[int]) -> None:
    """Also with samples of no token, which TND does not know."""
    inputs = heads(10, 10, 2, 1, FP32)
    assert_same(lambda *x: npu_attention.attention(*x, cu_seqlens=ends),
                lambda *x: reference.attention(*x, cu_seqlens=ends), *inputs, **CLOSE[FP32])


@pytest.mark.parametrize(("most_samples", "most_tokens", "calls"), [(2, 100, 2), (100, 5, 3)])
def test_packed_samples_in_several_calls(operators: Any, monkeypatch: pytest.MonkeyPatch, most_samples: int,
                                         most_tokens: int, calls: int) -> None:
    """Numbers and gradients of one call, with limits that a few samples reach."""
    monkeypatch.setattr(npu_attention, "PACKED_SAMPLES", most_samples)
    monkeypatch.setattr(npu_attention, "ATTENTION_TOKENS", most_tokens)
    ends = [0, 3, 3, 4, 8, 10]
    assert len(npu_attention.packed_calls(ends)) == calls
    assert_same(lambda *x: npu_attention.attention(*x, cu_seqlens=ends),
                lambda *x: reference.attention(*x, cu_seqlens=ends), *heads(10, 10, 2, 1, FP32), **CLOSE[FP32])


def test_the_operator_refuses_more_than_1k_samples(operators: Any) -> None:
    ends, mask = list(range(1, 1026)), compressed_mask(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="up to 1K samples"):
        operators.npu_fusion_attention(*(x.squeeze(1) for x in heads(1025, 1025, 2, 1, FP32)), head_num=6,
                                       input_layout="TND", atten_mask=mask, sparse_mode=2, actual_seq_qlen=ends,
                                       actual_seq_kvlen=ends)


def test_calls_of_packed_samples() -> None:
    assert npu_attention.packed_calls([0, 0, 4, 4, 10, 10]) == [[4, 10]]
    assert npu_attention.packed_calls([0, 600_000, 1_000_000, 1_000_001, 1_600_000]) == [
        [600_000, 1_000_000], [1, 600_000]]
    assert [len(ends) for ends in npu_attention.packed_calls(list(range(2002)))] == [1000, 1000, 1]


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 6), (3, 8)])
def test_attention_over_a_cache(operators: Any, queries: int, keys: int) -> None:
    """Prefill, a step, several tokens at an offset; a mask of its own; rows of different lengths."""
    query, key, value = (leaf(2, count, length, 16, seed=seed, dtype=BF16).detach() for seed, (count, length) in
                         enumerate(((6, queries), (2, keys + 4), (2, keys + 4))))
    key, value = key[:, :, :keys], value[:, :, :keys]
    tree = torch.rand(queries, keys, generator=torch.Generator().manual_seed(5)) < 0.5
    tree[:, 0] = True
    lengths = torch.tensor([keys - 2, keys])
    rows = (torch.arange(keys) < lengths[:, None])[:, None, None].expand(2, 1, queries, keys)
    for mask in (lower_right(queries, keys, query.device), tree, rows):
        torch.testing.assert_close(npu_attention.attend_rows(query, key, value, mask),
                                   reference.attend_rows(query, key, value, mask), **CLOSE[BF16])


@pytest.mark.parametrize("queries", [3, 1])
def test_whole_rows_of_a_cache_with_their_lengths(operators: Any, queries: int) -> None:
    """What lies behind a length is not seen, whatever the mask of the other forms is; rows of different lengths."""
    query = leaf(2, 4, queries, 16, dtype=BF16).detach()
    rows = [leaf(2, 2, 12, 16, seed=seed, dtype=BF16).detach() for seed in (1, 2)]
    lengths = RowLengths(torch.tensor([8, 5], dtype=torch.int32), 8, [8, 5])
    last = lengths.counts[:, None, None] - queries + torch.arange(queries)[:, None]
    places = torch.arange(8)[None, None] <= last
    expected = reference.attend_rows(query, *(x[:, :, :8] for x in rows), places[:, None])
    for mask in (None, places[:, None]):
        for behind in (0.0, float("nan")):
            kept = [x.clone() for x in rows]
            for x in kept:
                x[0, :, 8:], x[1, :, 5:] = behind, behind
            got = npu_attention.attend_rows(query, *kept, mask, lengths=lengths)
            torch.testing.assert_close(got, expected, **CLOSE[BF16])
    for form in (attend_rows, cuda_attention.attend_rows, reference.attend_rows):
        torch.testing.assert_close(form(query, *rows, places[:, None], lengths=lengths), expected, **CLOSE[BF16])
    device_only = RowLengths(lengths.counts, 8)  # the operator takes numbers of the host: the mask says it then
    torch.testing.assert_close(npu_attention.attend_rows(query, *rows, places[:, None], lengths=device_only), expected,
                               **CLOSE[BF16])
    end = queries + 2
    prefill = npu_attention.attend_rows(query[:1], *(x[:1] for x in rows), None, lengths=RowLengths(
        torch.tensor([end], dtype=torch.int32), end, [end]))
    torch.testing.assert_close(prefill, reference.attend_rows(query[:1], *(x[:1, :, :end] for x in rows), None),
                               **CLOSE[BF16])


def test_the_cache_hands_over_its_rows_as_they_lie(operators: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, a further chunk, a step of rows of other lengths: no copy of keys and values, no mask of their size."""
    cache = KVCache([1], 3, 32, 2, 16, dtype=BF16, device=torch.device("cpu"))
    plain = KVCache([1], 3, 32, 2, 16, dtype=BF16, device=torch.device("cpu"))
    start = cache._memory[1].data_ptr()
    end = start + cache._memory[1].nbytes
    seen: list[tuple[tuple[int, ...], bool, int, list[int] | None]] = []

    def record(query: Any, key: Any, value: Any, **options: Any) -> Any:
        mask = options["atten_mask"]
        seen.append((tuple(key.shape), all(start <= x.data_ptr() < end for x in (key, value)),
                     0 if mask is None else mask.shape[-1], options["actual_seq_lengths_kv"]))
        return operators.npu_fused_infer_attention_score(query, key, value, **options)

    monkeypatch.setattr(sys.modules["torch_npu"], "npu_fused_infer_attention_score", record)
    passes = [[Piece(0, 0, [1] * 5), Piece(1, 0, [1] * 3)], [Piece(0, 5, [1] * 4)],
              [Piece(0, 9, [1]), Piece(1, 3, [1])],
              [Piece(0, 10, [1] * 2, False, [0, 0], torch.eye(2, dtype=torch.bool))]]
    for number, pieces in enumerate(passes):
        count = sum(len(piece.tokens) for piece in pieces)
        new = [leaf(count, heads, 16, seed=seed + 3 * number, dtype=BF16).detach() for seed, heads in
               enumerate((4, 2, 2))]
        found = []
        for each, choices in ((cache, choose(Situation("npu", "Ascend910B2"))), (plain, [])):
            each.begin(pieces)
            each.place()
            with forms_in_use(choices, "cpu"):
                found.append(each.attend(1, *new))
            each.end()
        torch.testing.assert_close(*found, **CLOSE[BF16])
    assert seen == [((1, 2, 32, 16), True, 2048, [5]), ((1, 2, 32, 16), True, 2048, [3]),
                    ((1, 2, 32, 16), True, 2048, [9]), ((2, 2, 32, 16), True, 0, [10, 4]),
                    ((1, 2, 12, 16), False, 12, None)]


def test_weight_gradient(operators: Any) -> None:
    x, grad = leaf(11, 5, dtype=BF16).detach(), leaf(11, 3, seed=1, dtype=BF16).detach()
    got, expected = leaf(3, 5, dtype=FP32).detach(), leaf(3, 5, dtype=FP32).detach()
    npu_linear.accumulate_grouped(x, grad, got)
    reference.accumulate_weight_gradient(x, grad, expected)
    torch.testing.assert_close(got, expected)


def test_weight_gradient_beyond_the_width_of_the_operator(operators: Any) -> None:
    """An output layer of a large vocabulary, and a layer with as many inputs: both by the portable form."""
    assert limits.GROUPED_WIDTH == 65535
    for wide_in, wide_out in ((4, 65536), (65536, 4), (4, 65535)):
        x, grad = leaf(3, wide_in, dtype=BF16).detach(), leaf(3, wide_out, seed=1, dtype=BF16).detach()
        got, expected = torch.ones(wide_out, wide_in), torch.ones(wide_out, wide_in)
        CALLED.clear()
        npu_linear.accumulate_grouped(x, grad, got)
        reference.accumulate_weight_gradient(x, grad, expected)
        torch.testing.assert_close(got, expected, **CLOSE[BF16])
        assert bool(CALLED) == (max(wide_in, wide_out) <= 65535)
    with pytest.raises(RuntimeError, match="last dimension"):
        operators.npu_grouped_matmul_add_(torch.ones(1, 65536, 4), torch.ones(3, 65536, dtype=BF16),
                                          torch.ones(3, 4, dtype=BF16), torch.tensor([3]))


def test_the_end_of_the_group_is_on_the_device_once(operators: Any) -> None:
    npu_linear.one_group.cache_clear()
    for tokens in (11, 11, 7, 11):
        npu_linear.accumulate_grouped(leaf(tokens, 5, dtype=BF16).detach(), leaf(tokens, 3, dtype=BF16).detach(),
                                      torch.zeros(3, 5))
    assert npu_linear.one_group.cache_info()[:2] == (2, 2)  # hits, misses


@pytest.mark.parametrize(("product", "is_fused"), [
    ("Ascend910B1", True), ("Ascend910B2C", True), ("Ascend910_9392", True), ("Ascend950DT", True), ("", True),
    ("Ascend910B4-1", True), ("Ascend910A", False), ("Ascend910B", False), ("Ascend910ProB", False),
    ("Ascend310P3", False)])
def test_weight_gradient_by_product(operators: Any, product: str, is_fused: bool) -> None:
    situation = Situation("npu", product, wishes=frozenset({"gradient_accumulation_fusion"}))
    (choice,) = [each for each in choose(situation) if each.operation == "weight_gradient"]
    assert (choice.form.run is npu_linear.accumulate_grouped) == is_fused
    assert is_fused or f"it is documented for Atlas A2, Atlas A3, Ascend 950 and not for {product}" in str(choice)


def test_weight_gradient_of_mindspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in of the documented signature: chosen when asked for, in the dtypes that it takes, and right."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "npu" / "stand_in")
    wishes = frozenset({"use_mindspeed_ops", "gradient_accumulation_fusion"})
    try:
        forms = {dtype: next(choice for choice in choose(Situation("npu", "Ascend910B2", dtype, wishes=wishes))
                             if choice.operation == "weight_gradient") for dtype in (BF16, FP32)}
        assert forms[BF16].form.run is npu_linear.accumulate_mindspeed
        assert "not npu_matmul_add_fp32 of mindspeed: it takes float16, bfloat16 and not float32" in str(forms[FP32])
        x, grad = leaf(11, 5, dtype=BF16).detach(), leaf(11, 3, seed=1, dtype=BF16).detach()
        got, expected = leaf(3, 5, dtype=FP32).detach(), leaf(3, 5, dtype=FP32).detach()
        npu_linear.accumulate_mindspeed(x, grad, got)
        reference.accumulate_weight_gradient(x, grad, expected)
        torch.testing.assert_close(got, expected)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mindspeed"]:
            del sys.modules[name]


def test_the_compressed_mask_is_made_once(operators: Any) -> None:
    """Also when generation asks for it before training."""
    compressed_mask.cache_clear()
    with torch.inference_mode():
        mask = compressed_mask(torch.device("cpu"))
    npu_attention.attention(*heads(4, 4, 2, 1, FP32)).sum().backward()
    assert compressed_mask(torch.device("cpu")) is mask


@pytest.mark.parametrize(("call", "words"), [
    (lambda: pointwise.rms_norm(leaf(2, 8), leaf(8), 1e-6), "npu_rms_norm: it takes float16, bfloat16, float32"),
    (lambda: pointwise.rms_norm(leaf(2, 8, dtype=BF16), leaf(8, dtype=torch.float16), 1e-6), "_norm: the weight"),
    (lambda: pointwise.rotate(leaf(4, 8, dtype=FP32), leaf(4, 8), leaf(4, 8)), "npu_rotary_mul: it takes .sequence, b"),
    (lambda: pointwise.rotate(leaf(4, 1, 1, 896, dtype=FP32), leaf(4, 1, 1, 896), leaf(4, 1, 1, 896)),
     "npu_rotary_mul: it takes even head sizes below 896 and not 896"),
    (lambda: pointwise.swiglu(leaf(4, 7, dtype=FP32)), "npu_swiglu: it takes an even number of features and not 7"),
    (lambda: npu_attention.attention(*(leaf(3, 1, 1, 769, dtype=BF16) for _ in range(3))),
     "npu_fusion_attention: it takes head sizes up to 768 and not 769"),
    (lambda: npu_attention.attention(leaf(3, 1, 6, 8, dtype=BF16), *(leaf(3, 1, 4, 8, dtype=BF16) for _ in range(2))),
     "npu_fusion_attention: it takes up to 256 heads that the key/value groups divide, and not 6 heads with 4 groups"),
    (lambda: npu_attention.attention(leaf(3, 1, 2, 8, dtype=BF16), *(leaf(3, 1, 2, 8, dtype=FP32) for _ in range(2))),
     "npu_fusion_attention: query, key and value need one dtype and have bfloat16, float32"),
    (lambda: npu_attention.attention(*heads(4, 4, 6, 2, BF16), cu_seqlens=[0, 4]), "a batch of 1 and not 2"),
    (lambda: npu_attention.attention(*heads(4, 4, 6, 1, BF16), cu_seqlens=[1, 4]), "must rise from 0 to 4"),
    (lambda: npu_attention.attend_rows(*(leaf(1, 2, 3, 16, dtype=FP32) for _ in range(3)), None),
     "npu_fused_infer_attention_score: it takes float16, bfloat16 and not float32"),
    (lambda: npu_linear.accumulate_grouped(leaf(4, 2, dtype=BF16), leaf(4, 2, dtype=BF16), leaf(2, 2, dtype=BF16)),
     "npu_grouped_matmul_add_: it adds to a float32 gradient and not to bfloat16"),
    (lambda: npu_linear.gathered_product(leaf(4, 1, 128, dtype=BF16), leaf(128, 8, dtype=BF16), "x", 2),
     "npu_all_gather_base_mm: it takes products over 256 to 65534 features and not over 128"),
    (lambda: npu_linear.scattered_product(leaf(6, 1, 256, dtype=BF16), leaf(256, 8, dtype=BF16), "x", 3),
     "npu_mm_reduce_scatter_base: it takes 2, 4, 8, 16 tensor parallel ranks and not 3"),
    (lambda: npu_attention.attend_rows(*(leaf(1, 2, 3, 24, dtype=BF16) for _ in range(3)), None),
     "npu_fused_infer_attention_score: it takes head sizes that are multiples of 16 and not 24"),
    (lambda: npu_attention.attend_rows(leaf(1, 1, 1, 16, dtype=BF16), *(
        torch.empty(1, 1, 262145, 16, dtype=BF16) for _ in range(2)), None),
     "npu_fused_infer_attention_score: it takes steps over rows of up to 262144 tokens and not of 262145"),
    (lambda: npu_attention.attend_rows(*(leaf(1, 2, 3, 16, dtype=BF16) for _ in range(3)),
                                       torch.ones(1, 2, 3, 3, dtype=torch.bool)), "it takes one mask for all heads"),
    (lambda: npu_attention.attention(*(torch.empty(1_000_001, 1, 1, 1, dtype=BF16) for _ in range(3))),
     "npu_fusion_attention: it takes samples of up to 1000000 tokens and not of 1000001"),
])
def test_limits_are_checked_before_the_call(call: Any, words: str) -> None:
    """No torch_npu is needed to be told; one sentence with a way out."""
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert str(caught.value).endswith("or run with --device cpu.") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("operator", "arguments"), [
    ("npu_rms_norm", {"eps": 1e-6}), ("npu_swiglu", {"axis": -1}),
    ("npu_fusion_attention", {"head_num": 1, "input_layout": "SBH", "pre_tokens": 1}),
    ("npu_fused_infer_attention_score", {"softmax_scale": 1.0}),
])
def test_wrong_keywords_are_rejected(operators: Any, operator: str, arguments: dict[str, Any]) -> None:
    tensors = {"npu_rms_norm": 2, "npu_swiglu": 1}.get(operator, 3)
    with pytest.raises(RuntimeError, match="Unknown keyword argument"):
        getattr(operators, operator)(*(torch.ones(2, 2, 2) for _ in range(tensors)), **arguments)


def test_opcheck(operators: Any) -> None:
    """The contracts are well-behaved operators: schemas tell the truth about mutation and aliasing."""
    x = leaf(4, 2, 16, dtype=FP32).detach()
    mask = compressed_mask(x.device)
    samples: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("npu_rms_norm", (x, torch.ones(16)), {"epsilon": 1e-6}),
        ("npu_rotary_mul", (x.view(4, 2, 2, 8), torch.ones(4, 1, 1, 8), torch.zeros(4, 1, 1, 8)), {}),
        ("npu_swiglu", (x,), {"dim": -1}),
        ("npu_fusion_attention", (x, x + 1, x + 2), {"head_num": 2, "input_layout": "SBH", "atten_mask": mask,
                                                     "scale": 0.5, "sparse_mode": 2}),
        ("npu_fused_infer_attention_score", tuple(x.bfloat16().view(1, 2, 4, 16) + i for i in range(3)),
         {"num_heads": 2, "input_layout": "BNSD", "num_key_value_heads": 2}),
        ("npu_grouped_matmul_add_", (torch.ones(1, 3, 5), torch.ones(4, 3).bfloat16(), torch.ones(4, 5).bfloat16(),
                                     torch.tensor([4])), {}),
    ]
    for name, arguments, options in samples:
        torch.library.opcheck(getattr(operators, name).default, arguments, options, test_utils="test_schema")
    for name, arguments, options in samples[:1] + samples[2:4]:  # those that have a derivative
        needed = tuple(a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(getattr(operators, name).default, needed, options,
                              test_utils=("test_schema", "test_autograd_registration"))


def test_opcheck_of_the_derivatives(operators: Any) -> None:
    x = leaf(4, 2, 16, dtype=FP32).detach()
    mask, options = compressed_mask(x.device), {"head_num": 2, "input_layout": "SBH", "sparse_mode": 2}
    out, top, total, *_ = operators.npu_fusion_attention(x, x + 1, x + 2, **options, atten_mask=mask, scale=0.5)
    samples: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("npu_rms_norm_backward", (x, x + 1, torch.ones(16), torch.ones(4, 2, 1)), {}),
        ("npu_swiglu_backward", (x[..., :8].contiguous(), x), {}),
        ("npu_fusion_attention_grad", (x, x + 1, x + 2, x + 3), {
            **options, "atten_mask": mask, "softmax_max": top, "softmax_sum": total, "attention_in": out,
            "scale_value": 0.5}),
    ]
    for name, arguments, more in samples:
        torch.library.opcheck(getattr(operators, name).default, arguments, more, test_utils="test_schema")


@pytest.mark.parametrize("groups", [4, 2])
def test_numerical_derivatives(operators: Any, groups: int) -> None:
    """The derivatives that stand in for those of torch_npu, in fp64 through the operators' own autograd."""
    mask = compressed_mask(torch.device("cpu"))
    packed = [leaf(3, 1, count, 2, seed=seed) for seed, count in enumerate((4, groups, groups))]
    inputs = [x.flatten(2).detach().requires_grad_() for x in packed]
    ends = {"actual_seq_qlen": [1, 3], "actual_seq_kvlen": [1, 3]}
    with every_dtype():
        assert gradcheck(lambda *x: operators.npu_fusion_attention(
            *x, head_num=4, input_layout="SBH", atten_mask=mask, scale=0.5, sparse_mode=2)[0], inputs)
        assert gradcheck(lambda *x: operators.npu_fusion_attention(
            *(each[:, 0] for each in x), head_num=4, input_layout="TND", atten_mask=mask, scale=0.5, sparse_mode=2,
            **ends)[0], packed)
        assert gradcheck(lambda x, w: operators.npu_rms_norm(x, w, epsilon=1e-5)[0], (leaf(3, 2, 6), leaf(6, seed=1)))
        assert gradcheck(operators.npu_swiglu, (leaf(2, 3, 8),))
        table = rotary_table(5, 8, 1e4, dtype=torch.float64)
        assert gradcheck(lambda x: operators.npu_rotary_mul(  # torch's own derivative of its formula, as a check of it
            x, *table[:2, :, None, None]), (leaf(5, 1, 2, 8),))


def test_every_call_is_in_the_table() -> None:
    """CALLS against the calls in the code: position, keywords, nothing else."""
    found = set()
    for path in Path(modellink.ops.npu.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "torch_npu":
                    keywords = tuple(keyword.arg for keyword in node.keywords)
                    found.add((node.func.attr, len(node.args), keywords))
    assert found == {(call.operator, call.tensors, call.keywords) for call in CALLS}
