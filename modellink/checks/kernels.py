"""Fused forms that a flag asks for, against the limits that are documented and known before a device starts.

One rule for all devices: what this machine has not got (a kernel, a library, a product that a page names) makes of the
flag a wish, and another form runs, which the head of the log names. What the run itself asks for (its precision, sizes
and layout) and a kernel that is there cannot compute, ends the run.
"""

from collections.abc import Iterator

from modellink.config.errors import ProblemList
from modellink.config.settings import Settings
from modellink.device.specs import find_spec
from modellink.models.run import Run

# flag, what it asks for, the problem with it
Found = tuple[str, str, str | None]


def product_of(device: str) -> str:
    """The vendor's name of a device of this machine, as far as checks ask for it: of an NPU, which need not be started
    for that.

    Raises:
        ConfigError: the NPU does not answer.
    """
    from modellink.device.select import select_device  # imports torch
    from modellink.device.starting import reporting_device

    if device != "npu":
        return ""
    with reporting_device(device):
        return select_device(device).product_name()


def check_precision(settings: Settings, product: str, problems: ProblemList) -> None:
    """A product that is known to have no bf16 computes no run in it."""
    spec = find_spec(product)
    if settings.train.precision == "bf16" and spec is not None and not spec.has_bf16:
        problems.add(f"--bf16: {product} has no bf16 ({spec.source}); use --fp16 or --fp32.")


def check_kernels(run: Run, product: str, problems: ProblemList) -> None:
    """A form asked for by name must be able to compute this training run; without the flag another form would be
    taken, and the log would say why.

    Args:
        product: the vendor's name of the device, empty when unknown.
    """
    asked = run.settings.device
    if run.device not in ("npu", "cuda") or not any((
            asked.use_flash_attn, asked.use_fused_rotary_pos_emb, asked.use_fused_swiglu, asked.use_mc2,
            asked.use_symm_mem)):
        return
    for flag, operator, problem in (_on_npu if run.device == "npu" else _on_cuda)(run, product):
        if problem is not None:
            problems.add(f"{flag}: {operator} cannot compute this run: {problem}; change that (--bf16, --fp16, the "
                         f"layout or the model), or leave {flag} out.")


def _on_npu(run: Run, product: str) -> Iterator[Found]:
    """RMSNorm and SwiGLU have no limit that a run can break."""
    from modellink.models.forms import make_situation  # imports torch
    from modellink.ops.npu import limits

    asked = run.settings.device
    situation = make_situation(run, run.device, product)
    dtype, size = situation.dtype, situation.head_dim
    if limits.product_problem(product) is None:
        if asked.use_flash_attn:
            yield "--use-flash-attn", "npu_fusion_attention", limits.attention_problem(
                dtype, size, situation.heads, situation.groups)
        if asked.use_fused_rotary_pos_emb:
            yield "--use-fused-rotary-pos-emb", "npu_rotary_mul", limits.rotary_problem(
                dtype, size, run.settings.train.micro_batch_size, situation.heads)
    if asked.use_mc2 and limits.product_problem(product, limits.MC2_RANKS) is None and _is_for_layers(run):
        yield "--use-mc2", "MC2", _split_problem(run) or limits.mc2_layers_problem(situation)


def _on_cuda(run: Run, product: str) -> Iterator[Found]:
    """RMSNorm has a form in torch beside that of liger-kernel."""
    from modellink.models.forms import make_situation  # imports torch
    from modellink.ops.cuda import limits

    asked = run.settings.device
    situation = make_situation(run, run.device, product)
    dtype, size = situation.dtype, situation.head_dim
    if asked.use_flash_attn:
        yield "--use-flash-attn", "torch's attention", limits.flash_shape_problem(
            dtype, size, situation.heads, situation.groups)
    if asked.use_fused_rotary_pos_emb:
        yield "--use-fused-rotary-pos-emb", "liger-kernel", limits.rotary_problem(dtype, size, situation.heads)
    if asked.use_fused_swiglu:
        yield "--use-fused-swiglu", "liger-kernel", limits.row_problem(dtype, situation.ffn)
    if asked.use_symm_mem and _is_for_layers(run):
        # what GPUs can do for each other is asked when they have started
        yield "--use-symm-mem", "torch's symmetric memory", _split_problem(run)


def _is_for_layers(run: Run) -> bool:
    """Whether the run has layers whose communication a product could overlap."""
    return run.dims.tensor > 1 and run.lora is None


def _split_problem(run: Run) -> str | None:
    return None if run.dims.sequence_parallel else "it needs --sequence-parallel"
