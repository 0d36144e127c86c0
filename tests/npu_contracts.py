"""Contracts of torch_npu's operators without torch_npu.

The schemas of those we call, with CPU kernels that do what their pages document (Ascend/op-plugin, docs/zh/custom_APIs)
and refuse what these pages exclude. `kernels()` and `SCHEMAS` are plain data, usable with a real torch_npu too;
`contracts()` registers them in a namespace of their own and puts a module `torch_npu` with these operators in place.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

NAMESPACE = "npu_contract"
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
# communicator name -> group; what HCCL knows by itself
COMMUNICATORS: dict[str, dist.ProcessGroup] = {}
# operators whose kernel ran
CALLED: set[str] = set()

# as registered by torch-npu, cut to the arguments that 2.6 has
SCHEMAS = (
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_rms_norm_backward(Tensor dy, Tensor input, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)",
    "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half') -> Tensor",
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    "npu_swiglu_backward(Tensor grad_output, Tensor input, int dim=-1) -> Tensor",
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    "bool sync=False) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    "npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, str input_layout, *, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, Tensor? softmax_max=None, "
    "Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, float scale_value=1., "
    "float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int seed=0, "
    "int offset=0, int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, "
    "int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, "
    "Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, "
    "Tensor? block_table=None, int num_heads=1, float scale=1., int pre_tokens=2147483647, int next_tokens=2147483647, "
    "str input_layout='BSH', int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, int block_size=0, "
    "bool softmax_lse_flag=False) -> (Tensor, Tensor)",
    "npu_grouped_matmul_add_(Tensor(a!) self, Tensor x, Tensor weight, Tensor group_list, *, bool transpose_x=True, "
    "bool transpose_weight=False, int group_type=2) -> Tensor(a!)",
    "npu_all_gather_base_mm(Tensor input, Tensor x2, str hcom, int world_size, *, Tensor? bias=None, "
    "int gather_index=0, bool gather_output=True, int comm_turn=0) -> (Tensor, Tensor)",
    "npu_mm_reduce_scatter_base(Tensor input, Tensor x2, str hcom, int world_size, *, str reduce_op='sum', "
    "Tensor? bias=None, int comm_turn=0) -> Tensor",
)


def _need(condition: bool, rule: str) -> None:
    if not condition:
        raise RuntimeError(f"contract: {rule}")


@contextmanager
def every_dtype() -> Iterator[None]:
    """Inside the block the operators, and our limits of the products, take fp32 and fp64 too: what is wired wrongly
    can then be told from what is rounded."""
    from modellink.ops.npu import limits

    wide = (*FLOATS, torch.float64)
    with patch.multiple(sys.modules[__name__], HALF=wide, FLOATS=wide), patch.object(limits, "HALF", wide):
        yield


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    _need(x.dtype in FLOATS and gamma.dtype in (x.dtype, torch.float32) and gamma.shape == x.shape[-1:], "rms_norm")
    wide = _wide(x)
    rstd = (wide.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * _wide(gamma)).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    unit, slope = _wide(x) * rstd, _wide(dy) * _wide(gamma)
    dx = rstd * (slope - unit * (slope * unit).mean(-1, keepdim=True))
    return dx.to(x.dtype), (_wide(dy) * unit).flatten(0, -2).sum(0)  # in fp32 whatever the weight's dtype is


def _turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    _need(x.dtype in FLOATS and x.dim() == 4 and x.shape[-1] % 2 == 0 and x.shape[-1] < 896, "rotary_mul input")
    _need(rotary_mode == "half" and r1.shape == r2.shape and r1.shape[-1] == x.shape[-1], "rotary_mul cosines")
    for size, whole in zip(r1.shape, x.shape):
        _need(size in (1, whole), "rotary_mul broadcasts")
    return x * r1.to(x.dtype) + _turn(x) * r2.to(x.dtype)


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    _need(x.is_contiguous() and x.shape[dim] % 2 == 0 and x.dtype in FLOATS, "swiglu input")
    gate, up = _wide(x).chunk(2, dim)
    return (gate * gate.sigmoid() * up).to(x.dtype)


def swiglu_backward(dy: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    gate, up = _wide(x).chunk(2, dim)
    dy, sigmoid = _wide(dy), gate.sigmoid()
    return torch.cat((dy * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), dy * gate * sigmoid), dim).to(x.dtype)


@functools.cache
def _compressed_mask() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu_(1)


def _hidden(mask: Tensor | None, mode: int, rows: int, columns: int) -> Tensor:
    """What a query does not see, broadcastable to [batch, heads, rows, columns]."""
    if mask is None:
        return torch.zeros(rows, columns, dtype=torch.bool)
    _need(mask.dtype in (torch.bool, torch.uint8), "masks are bool or uint8")
    if mode in (2, 3):
        _need(torch.equal(mask.bool(), _compressed_mask()), "sparse modes 2 and 3 take the compressed mask")
        return torch.ones(rows, columns, dtype=torch.bool).triu(1 if mode == 2 else columns - rows + 1)
    _need(mode in (0, 1) and mask.shape[-2:] == (rows, columns), "a whole mask has the size of the scores")
    return mask.bool()


def _heads_first(x: Tensor, layout: str, head_dim: int) -> Tensor:
    """[batch, heads, length, head_dim] fp32; one sample for TND."""
    if layout == "SBH":
        x = x.unflatten(2, (-1, head_dim)).permute(1, 2, 0, 3)
    elif layout == "TND":
        x = x.transpose(0, 1)[None]
    return _wide(x)


def _samples(query: Tensor, layout: str, q_ends: Any, kv_ends: Any) -> list[tuple[slice, slice]]:
    """The rows and columns of scores that belong together."""
    if layout == "SBH":
        return [(slice(None), slice(None))]
    _need(layout == "TND" and query.dim() == 3, "the layout is SBH or TND here")
    _need(query.shape[0] <= 1 << 20, "packed samples have up to 1M tokens")
    _need(q_ends is not None and kv_ends is not None and len(q_ends) == len(kv_ends), "TND needs two equal lists")
    _need(1 <= len(q_ends) <= 1024, "TND takes up to 1K samples")
    _need(q_ends[0] > 0 and q_ends[-1] == query.shape[0] and list(q_ends) == sorted(set(q_ends)), "rising ends, no 0")
    return [(slice(a, b), slice(c, d)) for a, b, c, d in
            zip([0, *q_ends[:-1]], q_ends, [0, *kv_ends[:-1]], kv_ends, strict=True)]


def fusion_attention(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str,
                     pse: Tensor | None = None, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None,
                     scale: float = 1.0, keep_prob: float = 1.0, pre_tockens: int = 2147483647,
                     next_tockens: int = 2147483647, inner_precise: int = 0, prefix: Any = None,
                     actual_seq_qlen: Any = None, actual_seq_kvlen: Any = None, sparse_mode: int = 0,
                     gen_mask_parallel: bool = True, sync: bool = False) -> tuple[Any, ...]:
    head_dim = query.shape[-1] // head_num if input_layout == "SBH" else query.shape[-1]
    _need(query.dtype == key.dtype == value.dtype and query.dtype in FLOATS and head_dim <= 768, "attention dtypes")
    _need(keep_prob == 1.0 and pse is None, "no dropout and no bias here")
    q, k, v = (_heads_first(x, input_layout, head_dim) for x in (query, key, value))
    _need(q.shape[1] == head_num and head_num % k.shape[1] == 0 and head_num <= 256, "attention heads")
    repeat = head_num // k.shape[1]
    out, top, total = torch.empty_like(q), *(q.new_empty(*q.shape[:-1], 8) for _ in range(2))
    for rows, columns in _samples(query, input_layout, actual_seq_qlen, actual_seq_kvlen):
        scores = q[:, :, rows] @ k[:, :, columns].repeat_interleave(repeat, 1).transpose(-1, -2) * scale
        scores = scores.masked_fill(_hidden(atten_mask, sparse_mode, *scores.shape[-2:]), float("-inf"))
        top[:, :, rows] = scores.amax(-1, keepdim=True)
        powers = (scores - top[:, :, rows, :1]).exp()
        total[:, :, rows] = powers.sum(-1, keepdim=True)
        out[:, :, rows] = powers / total[:, :, rows, :1] @ v[:, :, columns].repeat_interleave(repeat, 1)
    back = out.permute(2, 0, 1, 3).flatten(2) if input_layout == "SBH" else out[0].transpose(0, 1)
    if input_layout == "TND":
        top, total = top[0].transpose(0, 1), total[0].transpose(0, 1)
    return (back.to(query.dtype).contiguous(), top.contiguous(), total.contiguous(), query.new_empty(0), 0, 0, 0)


def fusion_attention_grad(query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
                          atten_mask: Tensor | None = None, softmax_max: Tensor, softmax_sum: Tensor,
                          attention_in: Tensor, scale_value: float = 1.0, actual_seq_qlen: Any = None,
                          actual_seq_kvlen: Any = None, sparse_mode: int = 0, **unused: Any) -> tuple[Tensor, ...]:
    head_dim = query.shape[-1] // head_num if input_layout == "SBH" else query.shape[-1]
    q, k, v, do, o = (_heads_first(x, input_layout, head_dim) for x in (query, key, value, dy, attention_in))
    if input_layout == "TND":
        softmax_max, softmax_sum = (x.transpose(0, 1)[None] for x in (softmax_max, softmax_sum))
    groups, repeat = k.shape[1], head_num // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, columns in _samples(query, input_layout, actual_seq_qlen, actual_seq_kvlen):
        wide_k, wide_v = (x[:, :, columns].repeat_interleave(repeat, 1) for x in (k, v))
        scores = q[:, :, rows] @ wide_k.transpose(-1, -2) * scale_value
        hidden = _hidden(atten_mask, sparse_mode, *scores.shape[-2:])
        weights = (scores - softmax_max[:, :, rows, :1]).exp() / softmax_sum[:, :, rows, :1]
        weights = weights.masked_fill(hidden, 0.0)
        slope = do[:, :, rows] @ wide_v.transpose(-1, -2)
        slope = weights * (slope - (do[:, :, rows] * o[:, :, rows]).sum(-1, keepdim=True)) * scale_value
        dq[:, :, rows] = slope @ wide_k
        dk[:, :, columns] = (slope.transpose(-1, -2) @ q[:, :, rows]).unflatten(1, (groups, repeat)).sum(2)
        dv[:, :, columns] = (weights.transpose(-1, -2) @ do[:, :, rows]).unflatten(1, (groups, repeat)).sum(2)
    if input_layout == "SBH":
        dq, dk, dv = (x.permute(2, 0, 1, 3).flatten(2) for x in (dq, dk, dv))
    else:
        dq, dk, dv = (x[0].transpose(0, 1) for x in (dq, dk, dv))
    return (*(x.to(query.dtype).contiguous() for x in (dq, dk, dv)), query.new_empty(0))


def fused_infer_attention_score(query: Tensor, key: Tensor, value: Tensor, *, atten_mask: Tensor | None = None,
                                actual_seq_lengths_kv: Any = None, num_heads: int = 1, scale: float = 1.0,
                                input_layout: str = "BSH", num_key_value_heads: int = 0, sparse_mode: int = 0,
                                **unused: Any) -> tuple[Tensor, Tensor]:
    _need(query.dtype == key.dtype == value.dtype and query.dtype in HALF, "inference attention is fp16 or bf16")
    for tensor in (query, key, value, atten_mask):
        _need(tensor is None or tensor.is_contiguous(), "inference attention takes contiguous tensors only")
    _need(input_layout == "BNSD" and query.shape[1] == num_heads and query.shape[-1] <= 512, "heads and layout")
    _need(key.shape[1] == (num_key_value_heads or num_heads) and num_heads % key.shape[1] == 0, "key/value heads")
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if atten_mask is not None and sparse_mode == 0:
        shapes = {(1, queries, keys), (batch, 1, queries, keys), (1, 1, queries, keys)}
        shapes.add((batch, keys) if queries == 1 else (queries, keys))
        _need(tuple(atten_mask.shape) in shapes, "the shape of a whole mask")
    _need(queries > 1 or sparse_mode == 0, "a step of decoding takes a whole mask or none")
    lengths = [keys] if actual_seq_lengths_kv is None else list(actual_seq_lengths_kv)
    _need(len(lengths) == 1 or len(lengths) >= batch, "one length, or one for each row")
    _need(all(0 <= length <= keys for length in lengths), "lengths lie within the rows")
    _need(num_heads <= 256 and num_heads // key.shape[1] <= 64 and batch <= 65536, "heads to a group, rows")
    _need(queries == 1 or query.shape[-1] % 16 == 0, "the head size of several queries is a multiple of 16")
    _need(queries > 1 or keys <= 262144, "keys of a single query")
    repeat = num_heads // key.shape[1]
    out = torch.empty_like(query)
    for row in range(batch):
        end = lengths[0 if len(lengths) == 1 else row]
        scores = _wide(query[row]) @ _wide(key[row, :, :end]).repeat_interleave(repeat, 0).transpose(-1, -2) * scale
        mask = atten_mask
        if mask is not None and sparse_mode == 0:
            mask = mask.view(-1, queries, keys)[row if mask.numel() > queries * keys else 0, :, :end]
        scores = scores.masked_fill(_hidden(mask, sparse_mode, queries, end), float("-inf"))
        out[row] = (scores.softmax(-1) @ _wide(value[row, :, :end]).repeat_interleave(repeat, 0)).to(query.dtype)
    return out, query.new_empty(0, dtype=torch.float32)


def grouped_matmul_add_(total: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, *, transpose_x: bool = True,
                        transpose_weight: bool = False, group_type: int = 2) -> Tensor:
    _need(total.dtype == torch.float32 and total.dim() == 3 and x.dtype == weight.dtype and x.dtype in HALF, "dtypes")
    _need(transpose_x and not transpose_weight and group_type == 2, "groups lie along the reduced dimension")
    _need(x.shape[1] < 65536 and weight.shape[1] < 65536, "the last dimension of both factors")
    _need(group_list.dtype == torch.int64 and group_list.shape == (total.shape[0],), "one end for each group")
    ends = group_list.tolist()
    for index, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        total[index] += _wide(x[start:end]).t() @ _wide(weight[start:end])
    return total


def _mc2(x: Tensor, x2: Tensor, hcom: str, ranks: int) -> dist.ProcessGroup:
    group = COMMUNICATORS[hcom]
    # it works on the communicator beside the stream of the group's other collectives
    _need(not getattr(group, "awaited", ()), "no other collective of the group is under way")
    _need(x.dim() == 2 and x.is_contiguous() and x2.dim() == 2 and x.dtype == x2.dtype and x.dtype in HALF, "factors")
    _need(256 <= x.shape[1] < 65535 and ranks in (2, 4, 8, 16), "reduced dimension and ranks")
    _need(group.size() == ranks, "the communicator's size")
    return group


def all_gather_base_mm(x: Tensor, x2: Tensor, hcom: str, ranks: int, *, bias: Tensor | None = None,
                       gather_index: int = 0, gather_output: bool = True, comm_turn: int = 0) -> tuple[Tensor, Tensor]:
    _need(bias is None and gather_index == 0 and gather_output, "the left factor is gathered and given out")
    group = _mc2(x, x2, hcom, ranks)
    whole = x.new_empty(ranks * x.shape[0], x.shape[1])
    dist.all_gather_into_tensor(whole, x, group=group)
    return whole @ x2, whole


def mm_reduce_scatter_base(x: Tensor, x2: Tensor, hcom: str, ranks: int, *, reduce_op: str = "sum",
                           bias: Tensor | None = None, comm_turn: int = 0) -> Tensor:
    _need(bias is None and reduce_op == "sum" and x.shape[0] % ranks == 0, "a sum without bias")
    group = _mc2(x, x2, hcom, ranks)
    product = _wide(x) @ _wide(x2)
    out = product.new_empty(x.shape[0] // ranks, x2.shape[1])
    dist.reduce_scatter_tensor(out, product, group=group)
    return out.to(x.dtype)


def kernels() -> dict[str, Callable[..., Any]]:
    """The CPU kernel of each operator of `SCHEMAS`."""
    return {
        "npu_rms_norm": rms_norm, "npu_rms_norm_backward": rms_norm_backward, "npu_rotary_mul": rotary_mul,
        "npu_swiglu": swiglu, "npu_swiglu_backward": swiglu_backward, "npu_fusion_attention": fusion_attention,
        "npu_fusion_attention_grad": fusion_attention_grad,
        "npu_fused_infer_attention_score": fused_infer_attention_score,
        "npu_grouped_matmul_add_": grouped_matmul_add_, "npu_all_gather_base_mm": all_gather_base_mm,
        "npu_mm_reduce_scatter_base": mm_reduce_scatter_base,
    }


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operators: Any, x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, rstd = operators.npu_rms_norm(x, gamma, epsilon)
        ctx.save_for_backward(x, gamma, rstd)
        ctx.operators = operators
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *ctx.operators.npu_rms_norm_backward(grads[0], *ctx.saved_tensors), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operators: Any, x: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.operators, ctx.dim = operators, dim
        with torch._C._AutoDispatchBelowAutograd():
            return operators.npu_swiglu(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, ctx.operators.npu_swiglu_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.dim), None


class _FusionAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operators: Any, query: Tensor, key: Tensor, value: Tensor, head_num: int, layout: str,
                options: dict[str, Any]) -> tuple[Any, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            result = operators.npu_fusion_attention(query, key, value, head_num, layout, **options)
        out, top, total, empty = result[:4]
        ctx.save_for_backward(query, key, value, out, top, total, options.get("atten_mask"))
        ctx.call = operators, head_num, layout, options
        ctx.mark_non_differentiable(top, total, empty)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, out, top, total, mask = ctx.saved_tensors
        operators, head_num, layout, options = ctx.call
        names = ("actual_seq_qlen", "actual_seq_kvlen", "sparse_mode")
        found = operators.npu_fusion_attention_grad(
            query, key, value, grads[0].contiguous(), head_num, layout, atten_mask=mask, softmax_max=top,
            softmax_sum=total, attention_in=out, scale_value=options.get("scale", 1.0),
            **{name: options[name] for name in names if name in options})
        return None, *found[:3], None, None, None


def _recorded(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        CALLED.add(name)
        return kernel(*arguments, **options)

    return run


@contextmanager
def contracts() -> Iterator[Any]:
    """Inside the block `import torch_npu` gives the contracts; yields `torch.ops.<namespace>`."""
    library = torch.library.Library(NAMESPACE, "DEF")
    operators = getattr(torch.ops, NAMESPACE)
    for schema in SCHEMAS:
        library.define(schema)
    for name, kernel in kernels().items():
        library.impl(name, _recorded(name, kernel), "CPU")
    library.impl("npu_rms_norm", lambda x, gamma, epsilon=1e-6: _RMSNorm.apply(operators, x, gamma, epsilon),
                 "AutogradCPU")
    library.impl("npu_swiglu", lambda x, dim=-1: _SwiGLU.apply(operators, x, dim), "AutogradCPU")
    # the dispatcher hands on arguments by position that were given by keyword
    names = [argument.name for argument in operators.npu_fusion_attention.default._schema.arguments][5:]
    library.impl("npu_fusion_attention", lambda q, k, v, head_num, layout, *rest: _FusionAttention.apply(
        operators, q, k, v, head_num, layout, dict(zip(names, rest, strict=False))), "AutogradCPU")
    module: Any = types.ModuleType("torch_npu")
    for name in kernels():
        setattr(module, name, getattr(operators, name))
    # nothing else of sys.modules is put back: what is imported meanwhile must not be imported a second time
    sys.modules["torch_npu"] = module
    try:
        yield operators
    finally:
        del sys.modules["torch_npu"]
        library._destroy()
