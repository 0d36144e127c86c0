"""Starts torch.distributed and megatron-core's process groups for this rank, and the seeds of its layout."""

from datetime import timedelta

import torch
import torch.distributed as dist

from modellink.config.errors import ConfigError
from modellink.device.backends import group_place, reporting_start
from modellink.device.base import Device
from modellink.parallel.dims import ParallelDims
from modellink.parallel.join import bind, check_devices, join
from modellink.parallel.rank import Rank


def start_groups(device: Device, dims: ParallelDims, timeout_minutes: int) -> None:
    """Join the job: one default group, then the tensor, pipeline and data parallel groups.

    A second model of the same layout in this process shares the groups of the first.

    Raises:
        ConfigError: there is a model of another layout, this node has fewer accelerators than ranks, the ranks
            cannot join, or a group does not start where that happens while it is made.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        there = (parallel_state.get_tensor_model_parallel_world_size(),
                 parallel_state.get_pipeline_model_parallel_world_size())
        if there != (dims.tensor, dims.pipeline):
            raise ConfigError(f"tensor {dims.tensor} x pipeline {dims.pipeline}: this process has a model of tensor "
                              f"{there[0]} x pipeline {there[1]} already; close it first.")
        return

    rank = Rank.from_environment()
    check_devices(device, rank)
    bind(device, rank)
    if not dist.is_initialized():
        join(device, rank, timedelta(minutes=timeout_minutes))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tensor,
        pipeline_model_parallel_size=dims.pipeline,
        virtual_pipeline_model_parallel_size=dims.chunks if dims.chunks > 1 else None,
        distributed_timeout_minutes=timeout_minutes,
    )


def pipeline_stage() -> int:
    """The pipeline stage of this rank, after `start_groups`."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank()


def host_group(name: str, timeout: timedelta) -> dist.ProcessGroup:
    """A group of all ranks for tensors in host memory, on every device; every rank of the job makes it.

    Args:
        name: TALK_GROUP and the like, for errors.
        timeout: of what goes over it.

    Raises:
        ConfigError: gloo does not connect the ranks.
    """
    with reporting_start("gloo", "cpu", group_place(dist.get_rank(), name, range(dist.get_world_size()))):
        return dist.new_group(backend="gloo", timeout=timeout, group_desc=name)


def seed_everything(seed: int) -> None:
    """Seed weights and dropout: pipeline stages differ, tensor parallel ranks share all but their dropout tracker."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()  # as Megatron-LM does
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def stop_groups() -> None:
    """Leave the job in order, so that no rank reports a lost connection."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
