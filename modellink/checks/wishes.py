"""Flags that are wishes: one line says which have no effect and what is used instead."""

from collections.abc import Callable

from modellink.config.settings import Settings
from modellink.parallel.dims import ParallelDims

# wish -> (devices where modellink.ops has a form for it, the form used elsewhere)
KERNELS: dict[str, tuple[frozenset[str], str]] = {
    "use_flash_attn": (frozenset({"cuda", "npu"}), "tiles of queries or torch's scaled_dot_product_attention"),
    "use_fused_rmsnorm": (frozenset({"cuda", "npu"}), "RMSNorm by parts of rows, torch's for few"),
    "use_fused_rotary_pos_emb": (frozenset({"cuda", "npu"}), "rotary embedding of elementwise operations"),
    "use_fused_swiglu": (frozenset({"cuda", "npu"}), "SwiGLU of elementwise operations"),
    "use_mc2": (frozenset({"npu"}), "matrix product, then its communication"),
    "use_symm_mem": (frozenset({"cuda"}), "matrix product, then its communication"),
    "use_mindspeed_ops": (frozenset({"npu"}), "the operators of modellink"),
    "jit_compile": (frozenset(), "operators as they are"),
    "masked_softmax_fusion": (frozenset(), "attention that never holds the scores"),
    "gradient_accumulation_fusion": (frozenset({"cpu", "cuda", "npu"}), "a separate addition to the fp32 gradient"),
}
# operations that take their fused form on cuda and npu without being asked
UNASKED = {"use_flash_attn": "attention", "use_fused_rmsnorm": "RMSNorm",
           "use_fused_rotary_pos_emb": "rotary embedding", "use_fused_swiglu": "SwiGLU"}
# on cuda these come from liger-kernel; torch has a fused RMSNorm and flash attention of its own
OF_LIGER = ("use_fused_rotary_pos_emb", "use_fused_swiglu")
# booleans that this program always has on: section, field, what it always does
ALWAYS: tuple[tuple[str, str, str], ...] = (
    ("model", "use_mcore_models", "the model is always megatron-core's"),
    ("device", "attention_softmax_in_fp32", "the softmax of attention is always in fp32"),
    ("train", "accumulate_allreduce_grads_in_fp32", "gradients are always summed in fp32"),
    ("checkpoint", "exit_on_missing_checkpoint", "a --load folder without a checkpoint always stops the run"),
    ("logging", "log_throughput", "the metric line always has the throughput"),
)


def kernel_wishes(settings: Settings) -> list[str]:
    """The kernel flags that were switched on."""
    return [field for field in KERNELS if getattr(settings.device, field)]


def _instead(fields: list[str], device: str, reason: Callable[[], str | None] = lambda: "") -> list[str]:
    """A line for wishes that are not met; none when there is no reason (an empty one is not told)."""
    why = reason() if fields else None
    if why is None:
        return []
    flags = ", ".join("--" + field.replace("_", "-") for field in fields)
    return [f"{flags}: not available on {device}{f' ({why})' if why else ''}; used instead: "
            f"{'; '.join(KERNELS[field][1] for field in fields)}."]


def _cannot_be_off(settings: Settings, device: str) -> dict[str, str]:
    """Kernels that run whether they are wished for or not: field, what always happens."""
    always = {}
    if device in ("cpu", "cuda") and settings.device.compile != "layer":  # the only way to be without it there
        always["gradient_accumulation_fusion"] = ("weight gradients are always added to the fp32 gradient as they are "
                                                  "computed, which saves memory")
    if device != "cpu":
        always |= {field: f"{what} takes its fused form wherever that can compute the run"
                   for field, what in UNASKED.items()}
    return always


def _no_graphs(settings: Settings, dims: ParallelDims, device: str) -> str:
    if device != "cuda":
        return f"on {device}"
    if dims.tensor * dims.pipeline > 1:
        return f"with a model on {dims.tensor * dims.pipeline} ranks"
    return "with adapters" if settings.lora.lora_load is not None else ""


def _liger_missing() -> str | None:
    from modellink.ops.cuda.library import liger_missing  # imports torch

    return liger_missing()


def wish_notices(settings: Settings, dims: ParallelDims, device: str, backend: str) -> list[str]:
    """Lines for wishes that have no effect.

    Args:
        settings: the command line.
        dims: the layout.
        device: name of the device the run uses, empty when unknown.
        backend: the communication backend of that device, empty when unknown.
    """
    notices = []
    wishes = kernel_wishes(settings)
    unmet = [field for field in wishes if device not in KERNELS[field][0]]
    if device:
        notices += _instead(unmet, device)
    if device == "cuda" and backend:  # without a backend the run is elsewhere, and its packages are not known
        notices += _instead([field for field in wishes if field in OF_LIGER], device, _liger_missing)
    if device:
        notices += [f"--no-{field.replace('_', '-')} has no effect on {device}: {truth}."
                    for field, truth in _cannot_be_off(settings, device).items()
                    if field in settings.given and field not in wishes]
    off = [(field, truth) for section, field, truth in ALWAYS if not getattr(getattr(settings, section), field)]
    notices += [f"--no-{field.replace('_', '-')} has no effect: {truth}." for field, truth in off]
    if settings.parallel.sequence_parallel and dims.tensor == 1:
        notices.append("--sequence-parallel has no effect with --tensor-model-parallel-size 1.")
    if settings.generation.cuda_graphs and device:
        why = _no_graphs(settings, dims, device)
        if why:
            notices.append(f"--cuda-graphs has no effect {why}: steps are launched kernel by kernel.")
    asked = settings.parallel.distributed_backend
    if backend and asked not in ("auto", backend):
        notices.append(f"--distributed-backend {asked}: {device} uses its own, {backend}.")
    return notices
