"""Fused forms that a flag asks for on an NPU, against the limits that torch_npu documents."""

from modellink.config.errors import ProblemList
from modellink.models.run import Run


def check_kernels(run: Run, problems: ProblemList) -> None:
    """A form asked for by name must be able to compute this training run; without the flag another form would be
    taken, and the log would say why."""
    asked = run.settings.device
    if run.device != "npu" or not (asked.use_flash_attn or asked.use_fused_rotary_pos_emb or asked.use_mc2):
        return
    from modellink.models.forms import make_situation  # imports torch
    from modellink.ops.npu import limits

    situation = make_situation(run, run.device, "")
    found: list[tuple[str, str, str | None]] = []
    if asked.use_flash_attn:
        found.append(("--use-flash-attn", "npu_fusion_attention", limits.attention_problem(
            situation.dtype, situation.head_dim, situation.heads, situation.groups)))
    if asked.use_fused_rotary_pos_emb:
        found.append(("--use-fused-rotary-pos-emb", "npu_rotary_mul", limits.rotary_problem(
            situation.dtype, situation.head_dim, run.settings.train.micro_batch_size, situation.heads)))
    if asked.use_mc2 and situation.tensor > 1 and not situation.has_adapters:
        problem: str | None = "it needs --sequence-parallel"
        if situation.is_sequence_parallel:
            problem = limits.mc2_layers_problem(situation)
        found.append(("--use-mc2", "MC2", problem))
    for flag, operator, problem in found:
        if problem is not None:
            problems.add(f"{flag}: {operator} cannot compute this run: {problem}; change that (--bf16, --fp16, the "
                         f"layout or the model), or leave {flag} out.")
