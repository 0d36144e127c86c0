"""Fused forms that a flag asks for, against the limits that are documented and known before a device starts."""

from modellink.config.errors import ProblemList
from modellink.models.run import Run


def check_kernels(run: Run, problems: ProblemList) -> None:
    """A form asked for by name must be able to compute this training run; without the flag another form would be
    taken, and the log would say why."""
    asked = run.settings.device
    on_npu = run.device == "npu"
    overlapped = {"npu": asked.use_mc2, "cuda": asked.use_symm_mem}.get(run.device, False)
    if not (overlapped or on_npu and (asked.use_flash_attn or asked.use_fused_rotary_pos_emb)):
        return
    from modellink.models.forms import make_situation  # imports torch
    from modellink.ops.npu import limits

    situation = make_situation(run, run.device, "")
    found: list[tuple[str, str, str | None]] = []
    if on_npu and asked.use_flash_attn:
        found.append(("--use-flash-attn", "npu_fusion_attention", limits.attention_problem(
            situation.dtype, situation.head_dim, situation.heads, situation.groups)))
    if on_npu and asked.use_fused_rotary_pos_emb:
        found.append(("--use-fused-rotary-pos-emb", "npu_rotary_mul", limits.rotary_problem(
            situation.dtype, situation.head_dim, run.settings.train.micro_batch_size, situation.heads)))
    if overlapped and situation.tensor > 1 and not situation.has_adapters:
        flag, operator = ("--use-mc2", "MC2") if on_npu else ("--use-symm-mem", "torch's symmetric memory")
        problem: str | None = "it needs --sequence-parallel"
        if situation.is_sequence_parallel:
            # what GPUs can do for each other is asked when they have started
            problem = limits.mc2_layers_problem(situation) if on_npu else None
        found.append((flag, operator, problem))
    for flag, operator, problem in found:
        if problem is not None:
            problems.add(f"{flag}: {operator} cannot compute this run: {problem}; change that (--bf16, --fp16, the "
                         f"layout or the model), or leave {flag} out.")
