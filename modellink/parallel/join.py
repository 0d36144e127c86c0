"""Joining the job: the ranks find each other and start their communication library, or say in one sentence why not."""

import os
import re
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from modellink.config.errors import ConfigError
from modellink.device.backends import first_words, reporting_start
from modellink.device.base import Device
from modellink.device.network import interface_problem
from modellink.device.starting import reporting_device
from modellink.parallel.rank import Rank

RESOLVE_SECONDS = 30.0  # a name service may learn of a new machine a little later
LEAST_SECONDS = 1.0  # to speak with a rank 0 that came at the last moment; 0 is no limit for torch
MARGIN_SECONDS = 10.0  # torch itself takes somewhat longer than its timeout
SAME_FLAGS = "the same --nnodes, --nproc-per-node, --master-addr and --master-port on every node"


def check_devices(device: Device, rank: Rank) -> None:
    """Raise a ConfigError when ranks of this node have no accelerator of their own; a CPU serves any number."""
    most = max(rank.local_rank + 1, rank.local_world_size)
    if device.name != "cpu" and most > device.count():
        raise ConfigError(f"{most} ranks on this node, which has {device.count()} visible {device.name} devices: every "
                          "rank needs one of its own; start fewer with --nproc-per-node, or make more visible.")


def bind(device: Device, rank: Rank) -> None:
    """Bind this process to the accelerator of its local rank.

    Raises:
        ConfigError: the accelerator does not start.
    """
    with reporting_device(f"{device.name} {rank.local_rank}", f" on rank {rank.rank}"):
        device.set_current(rank.local_rank)
        torch.ones(1).to(device.current())


def join(device: Device, rank: Rank, timeout: timedelta) -> None:
    """Start torch's default group on the ranks of the job; the first collective has run when this returns.

    Args:
        device: whose collective backend starts; its accelerator is already bound to this process.
        rank: this process.
        timeout: for the start and for every later collective.

    Raises:
        ConfigError: the ranks do not find each other within about the timeout, or the backend then does not start,
            which takes it no longer than a collective may.
    """
    for backend in (device.backend, "gloo"):  # megatron-core keeps groups of gloo beside those of the device
        problem = interface_problem(backend)
        if problem is not None:
            raise ConfigError(problem)
    # without `device_id`: with it nccl would connect every group of megatron-core while it is made, used or not, and
    # messages between pipeline stages would wait for each other
    options: dict[str, Any] = {"timeout": timeout, "pg_options": device.group_options("world")}
    if "MASTER_ADDR" in os.environ:
        store = _meet(rank, timeout)
    elif rank.world_size > 1:
        raise ConfigError(f"WORLD_SIZE={rank.world_size} in the environment without MASTER_ADDR: the ranks cannot find "
                          "each other; start them with modellink launch or torchrun, or unset WORLD_SIZE.")
    else:  # a plain process: no port is needed
        store = dist.HashStore()
    total = torch.ones(1).to(device.current())
    with reporting_start(device.backend, device.name, f"on rank {rank.rank} of {rank.world_size}"):
        dist.init_process_group(device.backend, store=store, rank=rank.rank, world_size=rank.world_size, **options)
        dist.all_reduce(total)  # communicators start at the first collective
        device.synchronize()


def _meet(rank: Rank, timeout: timedelta) -> dist.Store:
    """The store through which all ranks of the job find each other."""
    seconds = timeout.total_seconds()
    end = time.monotonic() + seconds  # of the name's look-up, of rank 0's port and of the meeting together
    place = _check_address(rank, end)
    if rank.rank > 0:
        _reach(rank, place, end, seconds)
    left = max(LEAST_SECONDS, end - time.monotonic())
    found: list[Any] = []

    def ask() -> None:
        try:
            store = next(rendezvous("env://", rank.rank, rank.world_size, timeout=timedelta(seconds=left)))[0]
            store.set_timeout(timeout)  # of what is asked of it from now on
            found.append(store)
        except (RuntimeError, ValueError, OSError) as error:  # a thread has nobody else to tell
            found.append(error)

    # torch waits without end for an answer of whatever else listens there, so the wait is our own
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(left + MARGIN_SECONDS)
    result = found[0] if found else None
    if result is None or isinstance(result, Exception):
        raise ConfigError(_meeting_problem(rank, place, seconds, result)) from result
    return result


def _check_address(rank: Rank, end: float) -> str:
    """`MASTER_ADDR:MASTER_PORT` of the environment, after checking that it can be asked for.

    Args:
        rank: this process.
        end: when to give up, on the monotonic clock.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "")
    if not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"MASTER_PORT={port} in the environment must be a port from 1 to 65535; give --master-port, "
                          "or start the ranks with modellink launch or torchrun.")
    end = min(end, time.monotonic() + RESOLVE_SECONDS)
    while True:
        try:
            socket.getaddrinfo(address, int(port))
            return f"{address}:{port}"
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(f"--master-addr {address}: rank {rank.rank} cannot resolve this name "
                                  f"({error.strerror or error}); give the name or address of node 0.") from error
        time.sleep(1.0)


def _reach(rank: Rank, place: str, end: float, seconds: float) -> None:
    """Wait until something listens where rank 0 should; torch would fill the log with its own stack meanwhile.

    Args:
        rank: this process.
        place: of rank 0.
        end: when to give up, on the monotonic clock.
        seconds: the timeout, for the sentence.
    """
    address, _, port = place.rpartition(":")
    while True:
        try:
            socket.create_connection((address, int(port)), max(0.1, min(5.0, end - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(_no_answer(rank, place, seconds, f" ({error.strerror or error})")) from error
        time.sleep(0.2)


def _no_answer(rank: Rank, place: str, seconds: float, said: str = "") -> str:
    return (f"rank {rank.rank} of {rank.world_size} got no answer from rank 0 at {place} within {seconds:g} s "
            f"(--distributed-timeout-minutes){said}: see that node 0 was started, with {SAME_FLAGS}, and that no "
            "firewall is between.")


def _meeting_problem(rank: Rank, place: str, seconds: float, error: Exception | None) -> str:
    said = "" if error is None else str(error)
    port = place.rpartition(":")[2]
    joined = re.search(r"(\d+)/(\d+) clients joined", said)
    if "EADDRINUSE" in said:
        return f"--master-port {port}: is in use on this node; choose another, the same on every node."
    if error is not None and "failed to listen" in said:
        return (f"--master-port {port}: cannot be used on this node ({first_words(error)}); choose another, the same "
                "on every node.")
    if joined is not None or rank.rank == 0 and error is None:
        count = f"{joined[1]} of {joined[2]}" if joined is not None else f"some of {rank.world_size}"
        return (f"only {count} ranks joined within {seconds:g} s (--distributed-timeout-minutes): "
                f"see that every node was started, with {SAME_FLAGS}, and look into the logs of the missing ones.")
    if error is None or "timed out" in said or "failed to connect" in said:
        return _no_answer(rank, place, seconds)
    return (f"rank {rank.rank} of {rank.world_size} cannot join the job at {place}: {first_words(error)}; use "
            f"{SAME_FLAGS}.")
