"""The first collective of every group that a run uses, while nothing else goes on.

Some libraries connect the ranks of a group, and take its memory, at the first collective. That would be somewhere in
the first step; here the library's error becomes one sentence about the group. Groups that the run does not use stay as
they are: on an NPU each one that starts takes memory for good.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modellink.device.backends import group_place, reporting_start
from modellink.device.base import Device


def start_communicators(device: Device, groups: Sequence[str], *, has_messages: bool, wraps: bool) -> None:
    """Run one small collective in each of these groups, and wait for it. Every rank of the job calls this.

    A rank goes through its groups in the order of the names, and groups of one name have no rank in common: whoever
    waits, waits for a rank that is in an earlier group or on its way to the same, so no two wait for each other.

    Args:
        device: whose tensors go through the groups.
        groups: names of `communicators.py`, in its order.
        has_messages: pipeline stages also send each other single messages.
        wraps: the last stage sends to the first one (interleaved stages).

    Raises:
        ConfigError: the library of a group does not start, here or on another rank of it.
    """
    from megatron.core import parallel_state as state

    found: dict[str, Callable[[], Any]] = {
        "world": lambda: dist.group.WORLD,
        "tp": state.get_tensor_model_parallel_group,
        "dp": lambda: state.get_data_parallel_group(with_context_parallel=True),
        "pp": state.get_pipeline_model_parallel_group,
        "mp": state.get_model_parallel_group,
        "embd": state.get_embedding_group,
        "optimizer": state.get_intra_distributed_optimizer_instance_group,
    }
    number = torch.zeros(1).to(device.current())
    for name in groups:
        group = found[name]()
        with _starting(group, device):
            dist.all_reduce(number, group=group)
    if has_messages:
        pipeline = state.get_pipeline_model_parallel_group()
        with _starting(pipeline, device):
            _pass_along(number, pipeline, wraps)


@contextmanager
def _starting(group: dist.ProcessGroup, device: Device) -> Iterator[None]:
    place = group_place(dist.get_rank(), group.group_desc, dist.get_process_group_ranks(group))
    with reporting_start(dist.get_backend(group), device.name, place):
        yield
        device.synchronize()


def _pass_along(number: Tensor, pipeline: dist.ProcessGroup, wraps: bool) -> None:
    """One message from each stage to the next, begun by the first stage, which also ends it when the ring wraps."""
    ranks = dist.get_process_group_ranks(pipeline)
    place, last = dist.get_rank(pipeline), len(ranks) - 1
    # of two stages, megatron-core sends one way over the default group, so that both ways go on at once
    back = dist.group.WORLD if last == 1 else pipeline
    if place > 0:
        dist.recv(number, ranks[place - 1], pipeline)
    if place < last:
        dist.send(number, ranks[place + 1], pipeline)
    if wraps and place == last:
        dist.send(number, ranks[0], back)
    if wraps and place == 0:
        dist.recv(number, ranks[-1], back)
