"""Forward and backward of one global batch, and its loss over real tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from modellink.data.collate import Batch
from modellink.training.batches import StepBatches


def masked_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses of real tokens, their number, and both as the report of this microbatch.

    megatron-core scales the gradient once by the number of real tokens of the global batch, but only when it gets
    exactly three values, the second of an integer type. The report is a tensor of its own: the core divides the
    first value in place.

    Args:
        loss_mask: [batch, sequence], 1 where the token counts.
        losses: [batch, sequence] fp32.
    """
    mask = loss_mask.view(-1).float()
    total = torch.sum(losses.view(-1).float() * mask)
    count = mask.sum()
    report = torch.stack([total.detach(), count])
    return total, count.to(torch.int), {"loss": report}


def forward_step(batches: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
    """One microbatch through one model chunk, as megatron-core's schedules call it."""
    # A stage between the first and the last reads no data: it gets hidden states and gives hidden states.
    batch: Any = next(batches, {})
    packed = None
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"]
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
                                 max_seqlen_q=int(bounds.diff().max()), max_seqlen_kv=int(bounds.diff().max()))
    output = chunk(batch.get("tokens"), None, None, labels=batch.get("labels"), packed_seq_params=packed)
    return output, partial(masked_loss, batch.get("loss_mask"))


@dataclass
class StepResult:
    """What a step reports.

    Attributes:
        loss: mean over what the loss counts in the global batch: real tokens, or preference pairs.
        tokens: their number.
        means: further means over the same, by name.
        flags: the flags of all ranks, summed.
    """

    loss: float
    tokens: int
    means: dict[str, float]
    flags: list[int]


def run_microbatches(chunks: list[Any], batches: StepBatches, *, num_microbatches: int,
                     forward_only: bool) -> list[dict[str, Tensor]]:
    """Run the pipeline schedule; returns the reports of the microbatches on the last stage, [] elsewhere."""
    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches.iterators if interleaved else batches.iterators[0],
        model=chunks if interleaved else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=batches.seq_length,
        micro_batch_size=batches.micro_batch_size,
        forward_only=forward_only,
    )


def reduce_reports(reports: list[dict[str, Tensor]], flags: list[int], device: torch.device,
                   names: Sequence[str] = ()) -> StepResult:
    """Mean loss over the global batch, known to every rank; flags are summed over all ranks.

    One collective of the whole job a step, also so that every rank takes the same decision about stopping.

    Args:
        reports: of this rank's microbatches: `loss` is [sum of losses, their number, further sums].
        flags: numbers of this rank.
        device: of the collective.
        names: of the further sums.
    """
    width = 2 + len(names)
    values = torch.zeros(width + len(flags), dtype=torch.float32, device=device)
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        values[:width] = torch.stack([report["loss"] for report in reports]).sum(0)
    for place, flag in enumerate(flags, width):
        values[place].fill_(flag)  # an assignment would copy it from the host
    dist.all_reduce(values)
    total, count, *rest = values.tolist()
    means = {name: value / count if count else 0.0 for name, value in zip(names, rest)}
    return StepResult(total / count if count else 0.0, int(count), means, [int(flag) for flag in rest[len(names):]])
