"""HCCL's buffers: sizes by group, from the command line to the process groups and to the planner.

Every communicator holds two buffers of HCCL_BUFFSIZE (200 MiB unless set), and single sends and receives two of
P2P_HCCL_BUFFSIZE (20 MiB) with each neighbour: HCCL's environment variables, CANN documentation.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modellink.config.errors import ConfigError

MIB = 1024**2
FLAG = "--hccl-buffer-size"
DEFAULT_MIB, DEFAULT_PEER_MIB = 200, 20
# the flag's names of groups -> megatron-core's; `world` is torch's default group
CORE_NAMES = {"world": "world", "tp": "tp", "dp": "dp_cp", "pp": "pp", "mp": "mp", "embd": "embd",
              "optimizer": "intra_dist_opt_instance"}
USER_NAMES = {core: name for name, core in CORE_NAMES.items()}


@dataclass(frozen=True)
class BufferSizes:
    """Attributes:
        every: MiB of a buffer of every group, None when the flag does not say.
        groups: MiB by the flag's names of groups.
    """

    every: int | None = None
    groups: Mapping[str, int] = field(default_factory=dict)

    def asked(self, core_name: str) -> int | None:
        """MiB that the command line wants for a group of megatron-core's, None when it says nothing."""
        return self.groups.get(USER_NAMES.get(core_name, ""), self.every)

    def communicator_bytes(self, group: str, environment: Mapping[str, str] = os.environ) -> int:
        """Bytes that a communicator of a group (the flag's name of it) takes of the device."""
        asked = self.groups.get(group, self.every)
        return 2 * MIB * (asked if asked is not None else _size_in(environment, "HCCL_BUFFSIZE", DEFAULT_MIB))


def peer_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """Bytes that single sends and receives take with each neighbour."""
    return 2 * MIB * _size_in(environment, "P2P_HCCL_BUFFSIZE", DEFAULT_PEER_MIB)


def _size_in(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else default


def parse_buffer_sizes(words: Sequence[str] | None) -> BufferSizes:
    """The sizes that a command line names: `MiB`, or `GROUP=MiB` for each of some groups.

    Raises:
        ConfigError: every word that is neither.
    """
    every: int | None = None
    groups: dict[str, int] = {}
    problems = []
    for word in words or ():
        name, equals, size = word.rpartition("=")
        if not size.isdigit() or int(size) < 1:
            problems.append(f"{FLAG} {word}: the size must be a whole number of MiB, at least 1; correct it.")
        elif not equals:
            every = int(size)
        elif name in CORE_NAMES:
            groups[name] = int(size)
        else:
            problems.append(f"{FLAG} {word}: there is no group {name or 'without a name'}; choose one of "
                            f"{', '.join(CORE_NAMES)}.")
    if problems:
        raise ConfigError(problems)
    return BufferSizes(every, groups)


def buffer_notice(words: Sequence[str] | None, device: str) -> list[str]:
    """The line for a run on another device than an NPU."""
    if words is None or device in ("", "npu"):
        return []
    return [f"{FLAG} has no effect on {device}: its process groups have no such buffers."]


def buffer_line(sizes: Mapping[str, int]) -> str:
    """What the planner says about communicators: bytes by name."""
    parts = ", ".join(f"{name} {size // MIB} MiB" for name, size in sizes.items())
    return (f"HCCL        buffers of the groups take {sum(sizes.values()):,} bytes of a rank's total ({parts}; "
            f"{FLAG} sets them)")
