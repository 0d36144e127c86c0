"""What the first rank knows, on every rank: rank 0 reads files and the terminal, the others follow."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from modellink.config.errors import ConfigError
from modellink.parallel.groups import host_group

T = TypeVar("T")
# somebody may think about a question for longer than any collective of a model may take
PATIENCE = timedelta(days=365)


class Talk:
    """A line from the first rank to the others; every rank makes one at the same time.

    The others wait as long as it takes, and notice at once when the first rank is gone: its connections close.

    Raises:
        ConfigError: gloo does not connect the ranks.
    """

    def __init__(self) -> None:
        self.is_first = dist.get_rank() == 0
        # gloo on every device: what goes over it lies in the host's memory, and waiting costs nothing
        self._group = host_group("TALK_GROUP", PATIENCE) if dist.get_world_size() > 1 else None

    def tell(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, on every rank.

        Raises:
            ConfigError: `make` raised it; on every rank, so that all leave together. The job is over: no rank has
                process groups any more.
        """
        if self._group is None:
            return make()
        message: list[Any] = [None, None]
        if self.is_first:
            try:
                message = [make(), None]
            except ConfigError as error:
                message = [None, error.problems]
        dist.broadcast_object_list(message, 0, self._group)
        value, problems = message
        if problems is not None:
            # in order and at the same time: a rank whose peer is gone before may be aborted by gloo while it exits
            dist.barrier(self._group)
            dist.destroy_process_group()
            raise ConfigError(problems)
        return value  # type: ignore[no-any-return]
