"""Where a process is in the job."""

import os
from dataclasses import dataclass

from modellink.config.errors import ConfigError


@dataclass(frozen=True)
class Rank:
    """Where this process is in the job, as the launcher's environment says.

    Attributes:
        rank, world_size: in the job.
        local_rank, local_world_size: on this node.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Rank":
        """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of torch's launcher; a plain process is rank 0 of 1.

        Raises:
            ConfigError: one of them is not a number, or they contradict each other.
        """
        found = {name: os.environ.get(name, default) for name, default in (
            ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))}
        wrong = [f"{name}={value}" for name, value in found.items() if not value.isdigit()]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)} in the environment must be whole numbers; start the ranks with "
                              "modellink launch or torchrun, or unset them.")
        numbers = [int(value) for value in found.values()]
        if numbers[0] >= numbers[1]:
            raise ConfigError(f"RANK={numbers[0]} in the environment must be below WORLD_SIZE={numbers[1]}; start the "
                              "ranks with modellink launch or torchrun, or unset both.")
        return cls(*numbers)
