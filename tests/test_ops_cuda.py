"""The CUDA forms as far as a CPU can prove them: the choice, the limits, attention; `tests/liger` has the kernels.

Flash attention has no CPU kernel; `flash_on_cpu.py` gives its two aten operators one, so that torch's own varlen_attn
runs with its autograd.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_contracts import addmm_on_cpu
from flash_on_cpu import flash_on_cpu
from test_ops_reference import assert_same, leaf
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modellink.checks.compiling import check_compile
from modellink.checks.wishes import wish_notices
from modellink.config import ConfigError
from modellink.config.errors import ProblemList
from modellink.config.settings import parse_settings
from modellink.device import compilers
from modellink.ops import reference
from modellink.ops.attention import RowLengths, lower_right, torch_attend_rows, torch_attention
from modellink.ops.cross_entropy import torch_cross_entropy
from modellink.ops.cuda import attention as cuda_attention
from modellink.ops.cuda import cross_entropy as cuda_cross_entropy
from modellink.ops.cuda import library, limits, parallel_linear, pointwise, symmetric_linear
from modellink.ops.forms import Choice, Situation, forms_in_use
from modellink.ops.parallel_linear import accumulate_weight_gradient, accumulates_weight_gradients, torch_accumulate
from modellink.ops.table import choose, describe
from modellink.parallel.dims import ParallelDims

REPO = Path(__file__).parents[1]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CLOSE = {FP32: {"atol": 2e-6, "rtol": 2e-5}, BF16: {"atol": 4e-2, "rtol": 4e-2}}
GROUPED = {"heads": 40, "groups": 8}
LOOKS = (library.liger_missing, compilers.triton_missing, library.varlen_missing)


def chosen(situation: Situation) -> dict[str, Choice]:
    return {choice.operation: choice for choice in choose(situation)}


@pytest.fixture
def with_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel and Triton look installed; nothing of them is called."""
    for name in ("liger_missing", "triton_missing"):
        for module in (library, limits):
            monkeypatch.setattr(module, name, lambda: None)


@pytest.fixture
def looked_at_again() -> Iterator[None]:
    """What is installed is not known from before, nor remembered."""
    for function in LOOKS:
        function.cache_clear()
    yield
    for function in LOOKS:
        function.cache_clear()


@pytest.fixture
def without_liger(looked_at_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel and Triton look absent, whatever is installed."""
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def flash() -> Iterator[list[str]]:
    """Kernels of the flash operators for CPU tensors; gives the names of those that ran."""
    with flash_on_cpu() as called:
        yield called


def heads(queries: int, keys: int, count: int, groups: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (leaf(queries, batch, count, 8, dtype=dtype), leaf(keys, batch, groups, 8, seed=1, dtype=dtype),
            leaf(keys, batch, groups, 8, seed=2, dtype=dtype))


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("ends", [[0, 10], [0, 4, 5, 10], [0, 0, 4, 4, 10, 10]])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_packed_attention(flash: list[str], groups: int, ends: list[int], scale: float | None) -> None:
    """Forward and backward through torch's own varlen_attn; also with samples of no token."""
    assert_same(lambda *x: cuda_attention.attention(*x, cu_seqlens=ends, scale=scale),
                lambda *x: reference.attention(*x, cu_seqlens=ends, scale=scale),
                *heads(10, 10, 6, groups, 1, BF16), **CLOSE[BF16])
    assert flash == ["forward", "backward"]


def test_boundaries_are_copied_once_a_pass() -> None:
    library.boundaries.cache_clear()
    device = torch.device("cpu")
    with torch.inference_mode():
        first = library.boundaries((0, 3, 7), device)
    assert library.boundaries((0, 3, 7), device) is first and not first.is_inference()
    assert library.boundaries((0, 4, 7), device).tolist() == [0, 4, 7]


@pytest.mark.parametrize("form", [cuda_attention.attention, cuda_attention.repeated_attention])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 6), (3, 8)])
def test_attention_without_packing(form: Any, queries: int, keys: int) -> None:
    assert_same(form, reference.attention, *heads(queries, keys, 6, 2, 2, FP32), **CLOSE[FP32])


def test_repeated_heads_over_packed_samples() -> None:
    ends = [0, 4, 5, 10]
    assert_same(lambda *x: cuda_attention.repeated_attention(*x, cu_seqlens=ends),
                lambda *x: reference.attention(*x, cu_seqlens=ends), *heads(10, 10, 6, 2, 1, FP32), **CLOSE[FP32])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 6), (3, 8), (3, 3), (1, 3), (1, 1)])
def test_attention_over_a_cache(dtype: torch.dtype, groups: int, queries: int, keys: int) -> None:
    """Prefill, a step, several tokens at an offset; masks of one row, of each row and of each head.

    Three keys and three heads a group: the queries of a group must not be taken for a causal square.
    """
    query, key, value = (x.permute(1, 2, 0, 3).detach() for x in heads(queries, keys, 6, groups, 2, dtype))
    generator = torch.Generator().manual_seed(5)
    tree = torch.rand(queries, keys, generator=generator) < 0.5
    rows = (torch.arange(keys) < torch.tensor([max(keys - 2, 1), keys])[:, None])[:, None, None]
    each = torch.rand(2, 6, queries, keys, generator=generator) < 0.5
    for some in (tree, each):
        some[..., 0] = True
    for mask in (lower_right(queries, keys, query.device), tree, rows, rows.expand(2, 1, queries, keys), each):
        torch.testing.assert_close(cuda_attention.attend_rows(query, key, value, mask),
                                   reference.attend_rows(query, key, value, mask), **CLOSE[dtype])


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize(("queries", "lengths"), [(1, [8, 5, 1]), (3, [8, 3, 11]), (4, [9])])
def test_rows_of_a_cache_by_their_lengths(flash: list[str], groups: int, queries: int, lengths: list[int]
                                          ) -> None:
    """Steps, and parts of a prompt at an offset: read where they lie, and nothing behind their ends is seen."""
    query = leaf(len(lengths), 6, queries, 8, dtype=BF16).detach()
    memory = leaf(2, 4, groups, 12, 8, seed=1, dtype=BF16).detach()  # of 4 rows, as a cache holds them
    for row, end in enumerate(lengths):
        memory[:, row, :, end:] = float("nan")
    key, value = memory[:, :len(lengths)]
    places = torch.tensor(lengths)[:, None, None] - queries + torch.arange(queries)[:, None]
    seen = (torch.arange(max(lengths))[None, None] <= places)[:, None]
    expected = reference.attend_rows(query, *(x[:, :, :max(lengths)].nan_to_num(0.0) for x in (key, value)), seen, 0.3)
    ends = RowLengths(torch.tensor(lengths, dtype=torch.int32), max(lengths), lengths)
    for rows in ((key, value), tuple(x[:, :, :11] for x in (key, value)), tuple(x.clone() for x in (key, value))):
        got = cuda_attention.attend_lengths(query, *rows, seen, 0.3, lengths=ends)
        assert got.shape == query.shape
        torch.testing.assert_close(got, expected, **CLOSE[BF16])
    assert flash == ["over a cache"] * 3
    assert set(ends._starts) == {queries, 12 if len(lengths) == 1 else groups * 12} | (
        {11} if len(lengths) == 1 else set())


def test_what_needs_no_lengths_over_a_cache(flash: list[str]) -> None:
    """Rows of one length, and a mask that says more than a length: scaled_dot_product_attention."""
    query, key, value = (x.permute(1, 2, 0, 3).detach() for x in heads(3, 8, 6, 2, 2, BF16))
    tree = torch.rand(3, 8, generator=torch.Generator().manual_seed(5)) < 0.5
    tree[:, 0] = True
    torch.testing.assert_close(cuda_attention.attend_lengths(query, key, value, tree),
                               reference.attend_rows(query, key, value, tree), **CLOSE[BF16])
    step, ends = query[:, :, :1], RowLengths(torch.tensor([5, 5], dtype=torch.int32), 5, [5, 5])
    torch.testing.assert_close(cuda_attention.attend_lengths(step, key, value, None, lengths=ends),
                               reference.attend_rows(step, key[:, :, :5], value[:, :, :5], None), **CLOSE[BF16])
    assert flash == []


class Asked(TorchFunctionMode):
    """Notes how scaled_dot_product_attention is called: key/value heads, and whether it is to know of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, bool]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append((args[1].shape[1], kwargs.get("enable_gqa", False)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "count", "knows_groups"), [(FP32, 6, False), (BF16, 2, True), (FP16, 2, True)])
def test_a_prompt_keeps_its_scores_out_of_memory(dtype: torch.dtype, count: int, knows_groups: bool) -> None:
    """With grouped queries only flash attention does so, in 16 bits; in fp32 every head gets keys and values."""
    query, key, value = (x.permute(1, 2, 0, 3).detach() for x in heads(7, 7, 6, 2, 2, dtype))
    with Asked() as asked:
        got = cuda_attention.attend_rows(query, key, value, None)
    assert asked.calls == [(count, knows_groups)]
    close = {"atol": 5e-3, "rtol": 5e-3} if dtype == FP16 else CLOSE[dtype]
    torch.testing.assert_close(got, reference.attend_rows(query, key, value, None), **close)
    with Asked() as asked:  # what needs no groups, and a head size that flash attention does not take
        cuda_attention.attend_rows(query[:, :, :1], key, value, None)
        cuda_attention.attend_rows(*(torch.zeros(1, n, 5, 20, dtype=BF16) for n in (6, 2, 2)), None)
    assert asked.calls == [(2, False), (6, False)]


def test_weight_gradient_of_16_bits_is_not_rounded() -> None:
    """One call with the whole product in fp32, in the main gradient's own storage: nothing of 16 bits is added."""
    for dtype in (BF16, FP16):
        x, grad = leaf(50, 12, dtype=dtype).detach(), leaf(50, 9, seed=1, dtype=dtype).detach()
        total = leaf(9, 12, seed=2, dtype=FP32).detach()
        expected, storage = total.clone(), total.data_ptr()
        reference.accumulate_weight_gradient(x, grad, expected)
        with addmm_on_cpu() as called, forms_in_use(choose(Situation("cuda", dtype=dtype)), "cpu"):
            assert accumulates_weight_gradients("cpu")
            accumulate_weight_gradient(x, grad, total)
        assert called == [dtype] and total.data_ptr() == storage
        torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-6)
        rounded = leaf(9, 12, seed=2, dtype=FP32).detach()
        torch_accumulate(x, grad, rounded)
        assert (rounded - expected).abs().max() > 1e-3


def test_weight_gradient_calls_the_operator_as_it_is_registered() -> None:
    """torch's own shape kernel takes the call; the schema has the sum in its place."""
    total = torch.zeros(9, 12, device="meta")
    parallel_linear.accumulate_weight_gradient(torch.zeros(50, 12, device="meta", dtype=BF16),
                                               torch.zeros(50, 9, device="meta", dtype=BF16), total)
    assert total.shape == (9, 12) and total.dtype == FP32
    names = [argument.name for argument in torch.ops.aten.addmm.dtype_out._schema.arguments]
    assert names == ["self", "mat1", "mat2", "out_dtype", "beta", "alpha", "out"]


def test_which_weight_gradient_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without a flag; not where it would cut a graph, in fp32, or under a torch without the operator."""
    assert chosen(Situation("cuda"))["weight_gradient"].form.run is parallel_linear.accumulate_weight_gradient
    wide = chosen(Situation("cuda", dtype=FP32))["weight_gradient"]
    assert wide.form.run is torch_accumulate and "it takes float16, bfloat16 and not float32" in str(wide)
    graph = chosen(Situation("cuda", wishes=frozenset({"compile", "compile_layer"})))["weight_gradient"]
    assert graph.form.run is None and "--compile layer makes one graph of the layer" in str(graph)
    monkeypatch.setattr(torch.ops.aten.addmm, "overloads", lambda: ["default", "out"])
    older = chosen(Situation("cuda"))["weight_gradient"]
    assert older.form.run is torch_accumulate and f"addmm of torch {torch.__version__} has no out_dtype" in str(older)


def test_a_gpu_with_everything(with_liger: None) -> None:
    got = chosen(Situation("cuda"))
    assert got["rms_norm"].form.run is pointwise.rms_norm and got["rotary"].form.run is pointwise.rotate
    assert got["cross_entropy"].form.run is cuda_cross_entropy.cross_entropy
    assert got["swiglu"].form.run is pointwise.swiglu and got["attention"].form.run is cuda_attention.attention
    assert got["cached_attention"].form.run is cuda_attention.attend_lengths
    wide = chosen(Situation("cuda", dtype=FP32))["cached_attention"]
    assert wide.form.run is torch_attend_rows  # as many groups as heads: nothing to fold
    assert "flash attention takes float16, bfloat16 and not float32" in str(wide)
    grouped = chosen(Situation("cuda", dtype=FP32, **GROUPED))
    assert grouped["cached_attention"].form.run is cuda_attention.attend_rows


def test_what_is_used_without_liger(without_liger: None) -> None:
    lines = "\n".join(describe(Situation("cuda")))
    for operation in ("RMSNorm", "rotary", "SwiGLU"):
        assert f"not {operation} of liger-kernel: triton is not installed; pip install 'modellink[cuda]'" in lines
    assert "swiglu: elementwise torch operations" in lines
    loss = chosen(Situation("cuda"))["cross_entropy"]
    assert loss.form.run is torch_cross_entropy
    assert "gradient in place: triton is not installed; pip install 'modellink[cuda]'" in str(loss)


def test_what_is_missing_is_named(looked_at_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton without liger-kernel is enough for the loss; without a C compiler neither runs."""
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else "found")
    monkeypatch.setenv("CC", "cc")
    got = chosen(Situation("cuda"))
    assert got["cross_entropy"].form.run is cuda_cross_entropy.cross_entropy
    assert "not RMSNorm of liger-kernel: liger-kernel is not installed" in str(got["rms_norm"])
    library.liger_missing.cache_clear()
    compilers.triton_missing.cache_clear()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    got = chosen(Situation("cuda"))
    for operation in ("cross_entropy", "rms_norm"):
        assert "triton finds no C compiler to start its kernels with; install gcc" in str(got[operation])
    problems = ProblemList()
    check_compile(parse_settings("t", "t", ["--compile", "pointwise"]), "cuda", True, problems)
    assert problems.problems == ["--compile pointwise on cuda: triton finds no C compiler to start its kernels with; "
                                 "install gcc or name one with CC, or leave --compile out."]
    assert got["cross_entropy"].form.run is torch_cross_entropy


@pytest.mark.parametrize(("version", "fits"), [
    ("0.8.5", True), ("0.8.5.post1", True), ("0.8.12", True), ("0.8.4", False), ("0.8", False), ("0.9.0", False),
    ("0.9.0.dev3", False), ("1.0", False), (None, False)])
def test_which_versions_of_liger_are_used(looked_at_again: None, monkeypatch: pytest.MonkeyPatch, version: str | None,
                                          fits: bool) -> None:
    """The forms rely on its inside: of what was not read none is called, and doctor says so."""

    def installed(name: str) -> str:
        if version is None:  # a nightly build
            raise library.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setattr(library.importlib.metadata, "version", installed)
    monkeypatch.setattr(library, "liger", lambda operation: None)
    monkeypatch.setenv("CC", "cc")
    got = chosen(Situation("cuda"))["rms_norm"]
    assert (got.form.run is pointwise.rms_norm) == fits
    named = f"not RMSNorm of liger-kernel: liger-kernel {version or 'of an unknown version'} is installed"
    assert (named in str(got)) != fits


def test_the_package_asks_for_the_versions_that_are_used() -> None:
    oldest, beyond = (".".join(map(str, bound)) for bound in library.LIGER_VERSIONS)
    assert f'"liger-kernel>={oldest},<{beyond}"' in (REPO / "setup.py").read_text()
    assert f"liger-kernel from {oldest} to below {beyond}" in (REPO / "docs" / "cuda.md").read_text()
    assert f'"liger-kernel=={oldest}"' in (REPO / "Makefile").read_text()


def test_fp32_keeps_its_heads_apart(with_liger: None) -> None:
    """Flash attention has no fp32; with grouped queries only repeated heads keep the scores out of memory."""
    got = chosen(Situation("cuda", dtype=FP32, **GROUPED))
    assert got["attention"].form.run is cuda_attention.repeated_attention
    assert "flash attention takes float16, bfloat16 and not float32" in str(got["attention"])
    assert chosen(Situation("cuda", dtype=FP32))["attention"].form.run is torch_attention
    assert got["rms_norm"].form.run is pointwise.rms_norm


@pytest.mark.parametrize(("changes", "operation", "reason"), [
    ({"head_dim": 200}, "attention", "head sizes up to 192 that 8 divides, and not 200"),
    ({"head_dim": 20}, "attention", "head sizes up to 192 that 8 divides, and not 20"),
    ({"dtype": torch.float64}, "cross_entropy", "it takes float16, bfloat16, float32 and not float64"),
    ({"dtype": torch.float64}, "rms_norm", "it takes float16, bfloat16, float32 and not float64"),
    ({"hidden": 70000}, "rms_norm", "it takes rows of up to 65536 features and not 70000"),
    ({"ffn": 70000}, "swiglu", "it takes rows of up to 65536 features and not 70000"),
    ({"heads": 20000, "groups": 20000}, "rotary", "20000 heads of 128 are more than a block of Triton holds"),
])
def test_why_a_fused_form_does_not_run(with_liger: None, changes: dict[str, Any], operation: str, reason: str) -> None:
    choice = chosen(Situation("cuda", **changes))[operation]
    assert choice.form.devices == () and reason in str(choice)


def test_an_older_varlen_attn_is_not_called(looked_at_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its signature of torch 2.10, and one that has windows but no groups yet and reads rows to their end."""
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
                        is_causal=False, return_aux=None: None)
    assert "has no scale, window_size" in str(chosen(Situation("cuda"))["attention"])
    monkeypatch.setattr(module, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
                        return_aux=None, scale=None, window_size=(-1, -1): None)
    library.varlen_missing.cache_clear()
    assert "has no seqused_k" in str(chosen(Situation("cuda"))["cached_attention"])
    assert chosen(Situation("cuda"))["attention"].form.run is cuda_attention.attention
    assert "has no enable_gqa" in str(chosen(Situation("cuda", **GROUPED))["attention"])


OVERLAPPED: dict[str, Any] = {"tensor": 2, "is_sequence_parallel": True, "wishes": frozenset({"use_symm_mem"})}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with four GPUs, of which two and two reach each other's memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one // 2 == other // 2)


@pytest.mark.parametrize(("changes", "reason"), [
    ({}, None), ({"dtype": FP32}, None), ({"node_ranks": 4}, None), ({"node_ranks": 2}, None),
    ({"wishes": frozenset()}, "--use-symm-mem is off"), ({"tensor": 1, "wishes": frozenset()}, "--use-symm-mem is off"),
    ({"is_sequence_parallel": False}, "it needs --sequence-parallel with tensor parallel ranks"),
    ({"has_adapters": True}, "layers with LoRA adapters have no such form"),
    ({"node_ranks": 3}, "2 tensor parallel ranks must be on one node, and not spread over nodes of 3 ranks"),
    ({"tensor": 4}, "GPUs 0 and 2 do not reach each other's memory"),
    ({"tensor": 8}, "it takes 8 GPUs of one node, and there are 4"),
])
def test_who_gets_products_over_symmetric_memory(gpus: None, changes: dict[str, Any], reason: str | None) -> None:
    got = chosen(Situation("cuda", **{**OVERLAPPED, **changes}))
    column, row = got["column_linear"], got["row_linear"]
    if reason is None:
        assert column.form.run is symmetric_linear.column_linear and row.form.run is symmetric_linear.row_linear
        return
    assert column.form.run is None and row.form.run is None
    assert f"not symmetric memory, fused_all_gather_matmul: {reason}" in str(column)
    assert f"not symmetric memory, fused_matmul_reduce_scatter: {reason}" in str(row)


def test_doctor_says_whether_symmetric_memory_is_worth_a_trial(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flags, and so without a layout."""
    def said() -> str:
        return next(line for line in describe(Situation("cuda")) if "row_linear" in line)

    assert "--use-symm-mem is off" in said()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "it needs compute capability 8.0 (Ampere) or newer" in said()
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) != (2, 3))
    assert "GPUs 2 and 3 do not reach each other's memory" in said()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "it takes 2 GPUs of one node, and there is 1" in said()
    products = torch.ops.symm_mem
    schema = torch._C.parse_schema("symm_mem::fused_all_gather_matmul(Tensor A, Tensor[] Bs) -> Tensor")
    monkeypatch.setattr(products, "fused_all_gather_matmul", SimpleNamespace(default=SimpleNamespace(_schema=schema)))
    assert f"torch {torch.__version__} does not have these products" in said()


def test_memory_that_cannot_be_mapped_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed._symmetric_memory as memory

    def refuse(group_name: str, min_size: int) -> None:
        raise RuntimeError("CUDA driver error: invalid device ordinal\nException raised from map_block")

    monkeypatch.setattr(memory, "get_symm_mem_workspace", refuse)
    group: Any = SimpleNamespace(group_name="refused", size=lambda: 2)
    with pytest.raises(ConfigError, match=r"^--use-symm-mem: the GPUs of 2 tensor parallel ranks cannot map each "
                       r"other's memory \(CUDA driver error: invalid device ordinal\); .*, or leave"):
        symmetric_linear.products(group).gathered(leaf(4, 1, 8), leaf(8, 4), True)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: symmetric_linear.scattered_product(leaf(5, 1, 8), leaf(8, 4), SimpleNamespace(size=lambda: 2)),
     "symm_mem.fused_matmul_reduce_scatter: 2 ranks cannot share 5 rows evenly"),
    (lambda: pointwise.rms_norm(leaf(2, 8), leaf(8), 1e-6), "RMSNorm of liger-kernel: it takes float16, bfloat16"),
    (lambda: pointwise.rotate(leaf(4, 8, dtype=FP32), leaf(4, 8), leaf(4, 8)), "rotary of liger-kernel: it takes .s"),
    (lambda: pointwise.rotate(leaf(4, 1, 1, 7, dtype=FP32), leaf(4, 1, 1, 7), leaf(4, 1, 1, 7)), "even head sizes"),
    (lambda: pointwise.swiglu(leaf(4, 7, dtype=FP32)), "SwiGLU of liger-kernel: it takes an even number of features"),
    (lambda: cuda_attention.attention(*heads(4, 4, 6, 2, 1, FP32), cu_seqlens=[0, 4]), "flash attention takes float16"),
    (lambda: cuda_attention.attention(*heads(4, 4, 6, 2, 2, BF16), cu_seqlens=[0, 4]), "a batch of 1 and not 2"),
    (lambda: cuda_attention.attention(*heads(4, 4, 6, 2, 1, BF16), cu_seqlens=[0, 3]), "must rise from 0 to 4"),
    (lambda: cuda_attention.attention(leaf(4, 1, 6, 8, dtype=BF16), *heads(4, 4, 6, 2, 1, FP32)[1:], cu_seqlens=[0, 4]),
     "query, key and value need one dtype"),
    (lambda: cuda_cross_entropy.cross_entropy(leaf(4, 1, 8), torch.zeros(4, 1, dtype=torch.int64), None, 8),
     "cross-entropy in Triton: it takes float16, bfloat16, float32 and not float64"),
    (lambda: parallel_linear.accumulate_weight_gradient(leaf(4, 8, dtype=BF16), leaf(4, 2, dtype=BF16),
                                                        leaf(2, 8, dtype=BF16)), "it adds to float32 and not to bf"),
    (lambda: parallel_linear.accumulate_weight_gradient(leaf(4, 8, dtype=BF16), leaf(4, 2, dtype=FP32),
                                                        leaf(2, 8, dtype=FP32)), "input and gradient need one dtype"),
])
def test_limits_are_checked_before_the_call(with_liger: None, call: Any, words: str) -> None:
    """One sentence with a way out, whether the kernels are there or not."""
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert str(caught.value).endswith("or run with --device cpu.") and "\n" not in str(caught.value)


FUSED = ["--use-fused-rmsnorm", "--use-fused-swiglu", "--use-fused-rotary-pos-emb", "--use-flash-attn"]


def notices(device: str, backend: str) -> list[str]:
    settings = parse_settings("wishes", "", [*FUSED, "--model", "qwen15-0.5b"])
    return wish_notices(settings, ParallelDims(), device, backend)


def test_wishes_on_a_gpu(with_liger: None) -> None:
    assert notices("cuda", "nccl") == []


def test_wishes_on_a_gpu_without_liger(without_liger: None) -> None:
    """RMSNorm and attention have fused kernels in torch itself; the other wishes are not met, and it is said why."""
    (line,) = notices("cuda", "nccl")
    assert line.startswith("--use-fused-rotary-pos-emb, --use-fused-swiglu: not available on cuda")
    assert "triton is not installed; pip install 'modellink[cuda]'" in line
    assert notices("cuda", "") == []  # the job runs on another machine, and nothing is known of it
