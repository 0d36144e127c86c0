"""Starts a prepared run on this rank: device, core, groups, seeds. Nothing of this happens on import."""

import logging
import sys
import warnings

from modellink.device.base import Device
from modellink.device.buffers import parse_buffer_sizes
from modellink.device.options import DeviceOptions
from modellink.device.retarget import retarget
from modellink.device.select import select_device
from modellink.models.run import Run
from modellink.parallel.first_collectives import start_communicators
from modellink.parallel.groups import pipeline_stage, seed_everything, start_groups
from modellink.parallel.rank import Rank
from modellink.patches.ledger import apply_patches


def prepare_core(device: Device) -> None:
    """Compile megatron.core for the device and apply the ledger; once a process."""
    # the core says on import what it lacks (Apex, Transformer Engine); `modellink doctor` says what is used instead
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
    # torch 2.13 renames collectives that this core still calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    retarget(device)
    apply_patches(device)


def start(run: Run) -> Device:
    """Choose the device, prepare megatron-core for it, join the job, connect its groups and seed.

    Rank 0 prints the run's notices.
    """
    parallel = run.settings.parallel
    device = select_device(run.settings.device.device)
    device.prepare(DeviceOptions(parallel.distributed_timeout_minutes, run.settings.device.use_deter_comp,
                                 parse_buffer_sizes(parallel.hccl_buffer_size)))
    prepare_core(device)
    start_groups(device, run.dims, parallel.distributed_timeout_minutes)
    is_interleaved = run.dims.chunks > 1
    start_communicators(device, run.groups(pipeline_stage()), wraps=is_interleaved,
                        has_messages=run.dims.pipeline > 1 and (is_interleaved or not run.trains))
    seed_everything(run.settings.train.seed)
    if Rank.from_environment().rank == 0:
        for notice in run.notices:
            print(notice, file=sys.stderr, flush=True)
    return device
