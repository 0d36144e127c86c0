"""What a run asks of its device before anything of it starts: timeouts, deterministic computation, HCCL's buffers."""

import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from modellink.config.errors import ConfigError
from modellink.device.buffers import BufferSizes

# variable -> the values with which a device computes deterministically; the first one is set where there is none
Required = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class DeviceOptions:
    """Attributes:
        timeout_minutes: of a collective.
        deterministic: the same run gives the same bits again.
        buffers: sizes of HCCL's buffers, where the command line names any.
    """

    timeout_minutes: int = 10
    deterministic: bool = False
    buffers: BufferSizes = field(default=BufferSizes())


def make_deterministic(required: Required, environment: MutableMapping[str, str] = os.environ) -> None:
    """Switch torch to deterministic algorithms and set the variables that libraries below it read.

    Raises:
        ConfigError: the environment demands the contrary.
    """
    for name, values in required.items():
        found = environment.setdefault(name, values[0])
        if found not in values:
            raise ConfigError(f"--use-deter-comp: the environment has {name}={found}, with which results differ from "
                              f"run to run; unset it or set it to {values[0]}.")
    torch.use_deterministic_algorithms(True)
    # nothing here reads memory before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


UNORDERED = " does not have a deterministic implementation"


@contextmanager
def refusals_explained() -> Iterator[None]:
    """Inside the block, torch's refusal of an operation under `--use-deter-comp` becomes a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(UNORDERED)
        if not found:
            raise
        raise ConfigError(f"--use-deter-comp: {operation.splitlines()[-1]} cannot give the same bits again on this "
                          "device; leave out the flag that uses it, or --use-deter-comp.") from error
