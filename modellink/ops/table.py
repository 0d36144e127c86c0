"""The table of operations: every form of each, fastest first, and the choice among them."""

import importlib
import importlib.util

import torch

from modellink.ops import (
    adamw,
    attention,
    compiled,
    cross_entropy,
    frozen_linear,
    parallel_linear,
    reference,
    rms_norm,
    rotary,
    swiglu,
)
from modellink.ops.cpu import attention as cpu_attention
from modellink.ops.cpu import frozen_linear as cpu_frozen_linear
from modellink.ops.cpu import linear as cpu_linear
from modellink.ops.cpu import rms_norm as cpu_rms_norm
from modellink.ops.cuda import attention as cuda_attention
from modellink.ops.cuda import cross_entropy as cuda_cross_entropy
from modellink.ops.cuda import limits as cuda_limits
from modellink.ops.cuda import parallel_linear as cuda_linear
from modellink.ops.cuda import pointwise as cuda_pointwise
from modellink.ops.cuda import symmetric_linear
from modellink.ops.forms import Choice, Form, Situation, name_of_dtype
from modellink.ops.limits import dtype_problem
from modellink.ops.npu import attention as npu_attention
from modellink.ops.npu import limits, pointwise
from modellink.ops.npu import parallel_linear as npu_linear
from modellink.ops.npu.companions import companion_lines
from modellink.ops.npu.library import has_operator

CPU, CUDA, NPU, COMPILING = ("cpu",), ("cuda",), ("npu",), ("cpu", "cuda")


def _attention(situation: Situation) -> str | None:
    return limits.product_problem(situation.product) or limits.attention_problem(
        situation.dtype, situation.head_dim, situation.heads, situation.groups)


def _cached_attention(situation: Situation) -> str | None:
    return limits.product_problem(situation.product) or limits.cached_attention_problem(
        situation.dtype, situation.head_dim, situation.heads, situation.groups)


def _compile(situation: Situation) -> str | None:
    return None if "compile" in situation.wishes else "--compile is off"


def _whole_layer(situation: Situation) -> str | None:
    # Python loops over tiles and what a product adds elsewhere would cut a layer's graph
    return "--compile layer makes one graph of the layer" if "compile_layer" in situation.wishes else None


def _onednn(situation: Situation) -> str | None:
    return _whole_layer(situation) or cpu_linear.problem(situation)


def _liger_norm(situation: Situation) -> str | None:
    return cuda_limits.liger_problem(cuda_limits.row_problem(situation.dtype, situation.hidden))


def _liger_rotary(situation: Situation) -> str | None:
    return cuda_limits.liger_problem(
        cuda_limits.rotary_problem(situation.dtype, situation.head_dim, situation.heads))


def _liger_swiglu(situation: Situation) -> str | None:
    return cuda_limits.liger_problem(cuda_limits.row_problem(situation.dtype, situation.ffn))


def _flash(situation: Situation) -> str | None:
    return cuda_limits.flash_problem(situation.dtype, situation.head_dim, situation.heads, situation.groups)


def _cached_flash(situation: Situation) -> str | None:
    return cuda_limits.cached_flash_problem(situation.dtype, situation.head_dim, situation.heads, situation.groups)


def _grouped_queries(situation: Situation) -> str | None:
    return "every head has its own key and value" if situation.heads == situation.groups else None


def _overlapped(situation: Situation, wish: str) -> str | None:
    if wish not in situation.wishes:
        return f"--{wish.replace('_', '-')} is off"
    if not situation.is_sequence_parallel:
        return "it needs --sequence-parallel with tensor parallel ranks"
    return "layers with LoRA adapters have no such form" if situation.has_adapters else None


def _mc2(situation: Situation) -> str | None:
    return _overlapped(situation, "use_mc2") or limits.mc2_layers_problem(situation)


def _symmetric(situation: Situation) -> str | None:
    # the machine first: doctor, which knows no flags, then says whether the flag is worth a trial
    return (cuda_limits.symmetric_memory_problem(situation.tensor, situation.node_ranks)
            or _overlapped(situation, "use_symm_mem"))


def _mindspeed(situation: Situation) -> str | None:
    if "use_mindspeed_ops" not in situation.wishes:
        return "--use-mindspeed-ops is off"
    if importlib.util.find_spec("mindspeed") is None:
        return "mindspeed is not installed"
    try:
        importlib.import_module("mindspeed.ops.npu_matmul_add")
    except (ImportError, OSError, RuntimeError) as error:
        return f"mindspeed's operator cannot be imported ({error})"
    return _accumulates(situation) or limits.dtype_problem(situation.dtype, limits.HALF)


def _accumulates(situation: Situation) -> str | None:
    # on CPU and GPU it saves memory and passes over it; on the NPU it is a wish
    if situation.device in COMPILING:
        return _whole_layer(situation)
    if "gradient_accumulation_fusion" not in situation.wishes:
        return "--gradient-accumulation-fusion is off"
    return None


def _inside_product(situation: Situation) -> str | None:
    if situation.dtype != torch.float32:
        return f"the product is in {name_of_dtype(situation.dtype)} and the main gradient in float32"
    return _accumulates(situation)


def _addmm(situation: Situation) -> str | None:
    # the main gradients of training are always fp32
    return _accumulates(situation) or cuda_limits.weight_gradient_problem(
        situation.dtype, situation.dtype, torch.float32)


def _grouped(situation: Situation) -> str | None:
    problem = (_accumulates(situation) or limits.product_problem(situation.product)
               or limits.dtype_problem(situation.dtype, limits.HALF))
    if problem is None and not has_operator("npu_grouped_matmul_add_"):
        return "this torch_npu has no npu_grouped_matmul_add_"
    return problem


# operation -> its forms, fastest first; the last one is the reference, always usable
TABLE: dict[str, tuple[Form, ...]] = {
    "rms_norm": (
        Form("npu_rms_norm", pointwise.rms_norm, NPU, lambda s: dtype_problem(s.dtype)),
        Form("torch.compile of the formulas", compiled.rms_norm, COMPILING, _compile),
        Form("RMSNorm of liger-kernel", cuda_pointwise.rms_norm, CUDA, _liger_norm),
        Form("parts of rows in the cache", cpu_rms_norm.rms_norm, CPU, _whole_layer),
        Form("torch rms_norm", rms_norm.torch_rms_norm),
        Form("plain formulas", reference.rms_norm),
    ),
    "rotary": (
        Form("npu_rotary_mul", pointwise.rotate, NPU,
             lambda s: limits.product_problem(s.product) or limits.rotary_problem(s.dtype, s.head_dim)),
        Form("torch.compile of the formulas", compiled.rotate, COMPILING, _compile),
        Form("rotary of liger-kernel", cuda_pointwise.rotate, CUDA, _liger_rotary),
        Form("elementwise torch operations", rotary.torch_rotate),
        Form("plain formulas", reference.rotate),
    ),
    "swiglu": (
        Form("npu_swiglu", pointwise.swiglu, NPU,
             lambda s: limits.product_problem(s.product) or dtype_problem(s.dtype)),
        Form("torch.compile of the formulas", compiled.swiglu, COMPILING, _compile),
        Form("SwiGLU of liger-kernel", cuda_pointwise.swiglu, CUDA, _liger_swiglu),
        Form("elementwise torch operations", swiglu.torch_swiglu),
        Form("plain formulas", reference.swiglu),
    ),
    "attention": (
        Form("npu_fusion_attention (SBH, packed TND, compressed causal mask)", npu_attention.attention, NPU,
             _attention),
        Form("torch scaled_dot_product_attention, varlen_attn for packed samples", cuda_attention.attention, CUDA,
             _flash),
        Form("torch scaled_dot_product_attention, keys and values repeated for their heads",
             cuda_attention.repeated_attention, CUDA, _grouped_queries),
        Form(f"tiles of queries up to {cpu_attention.LONGEST} tokens, torch scaled_dot_product_attention beyond",
             cpu_attention.attention, CPU, _whole_layer),
        Form("torch scaled_dot_product_attention", attention.torch_attention),
        Form("plain formulas", reference.attention),
    ),
    "cached_attention": (
        Form("npu_fused_infer_attention_score (BNSD)", npu_attention.attend_rows, NPU, _cached_attention),
        Form("torch varlen_attn, scaled_dot_product_attention for rows of one length", cuda_attention.attend_lengths,
             CUDA, _cached_flash),
        Form("torch scaled_dot_product_attention, heads of a group as queries", cuda_attention.attend_rows, CUDA,
             _grouped_queries),
        Form("torch scaled_dot_product_attention", attention.torch_attend_rows),
        Form("plain formulas", reference.attend_rows),
    ),
    "frozen_linear": (
        Form("oneDNN, weight packed once", cpu_frozen_linear.frozen_linear, CPU,
             lambda s: cpu_frozen_linear.problem(s.dtype)),
        Form("torch linear", frozen_linear.torch_frozen_linear),
        Form("plain formulas", reference.frozen_linear),
    ),
    "cross_entropy": (
        Form("chunks of tokens, derivative beside the loss", cross_entropy.cpu_cross_entropy, CPU,
             lambda s: cross_entropy.one_rank_problem(s.dtype, is_split=s.tensor > 1)),
        Form("Triton, one pass over the logits, vocabulary parallel, gradient in place",
             cuda_cross_entropy.cross_entropy, CUDA, lambda s: cuda_limits.loss_problem(s.dtype)),
        Form("chunks of tokens, vocabulary parallel, gradient in place", cross_entropy.torch_cross_entropy),
        Form("plain formulas", reference.vocab_parallel_cross_entropy),
    ),
    "adamw": (
        Form("torch's fused AdamW", adamw.torch_adamw),
        Form("plain formulas", reference.adamw),
    ),
    "weight_gradient": (
        Form("npu_matmul_add_fp32 of mindspeed", npu_linear.accumulate_mindspeed, NPU, _mindspeed),
        Form(f"npu_grouped_matmul_add_ up to {limits.GROUPED_WIDTH} features, product and addition beyond",
             npu_linear.accumulate_grouped, NPU, _grouped),
        Form("addmm of 16-bit factors into the fp32 main gradient", cuda_linear.accumulate_weight_gradient, CUDA,
             _addmm),
        Form("added to the main gradient inside the product", parallel_linear.torch_accumulate, (), _inside_product),
        Form("added to the main gradient behind the product", parallel_linear.torch_accumulate, (), _accumulates),
        Form("a gradient of its own, added by megatron-core", None),
        Form("plain formulas", reference.accumulate_weight_gradient),
    ),
    "linear": (
        Form("oneDNN's products", cpu_linear.linear, CPU, _onednn),
        Form("megatron-core, torch's products", None),
        Form("plain formulas", reference.linear),
    ),
    "column_linear": (
        Form("MC2, npu_all_gather_base_mm", npu_linear.column_linear, NPU, _mc2),
        Form("symmetric memory, fused_all_gather_matmul", symmetric_linear.column_linear, CUDA, _symmetric),
        Form("megatron-core, collectives beside the products of the backward", None),
        Form("plain formulas", reference.column_linear),
    ),
    "row_linear": (
        Form("MC2, npu_mm_reduce_scatter_base", npu_linear.row_linear, NPU, _mc2),
        Form("symmetric memory, fused_matmul_reduce_scatter", symmetric_linear.row_linear, CUDA, _symmetric),
        Form("megatron-core, product and then its collective", None),
        Form("plain formulas", reference.row_linear),
    ),
}


def choose(situation: Situation) -> list[Choice]:
    """The first usable form of every operation, with the reasons against those of this device before it."""
    choices = []
    for operation, forms in TABLE.items():
        passed: list[tuple[str, str]] = []
        for form in forms:
            if not form.is_for(situation.device):
                continue
            reason = form.why_not(situation)
            if reason is None:
                choices.append(Choice(operation, form, tuple(passed)))
                break
            passed.append((form.name, reason))
    return choices


def describe(situation: Situation) -> list[str]:
    """What `modellink doctor` and a training log say: the situation, then one line for each operation."""
    head = (f"operations for {name_of_dtype(situation.dtype)} and heads of {situation.head_dim} on {situation.device}"
            + (f" ({', '.join(sorted(situation.wishes))})" if situation.wishes else "") + ":")
    beside = companion_lines() if situation.device == "npu" else []
    return [head, *(f"  {line}" for line in [*choose(situation), *beside])]
