"""A communication library that does not start: one sentence, whoever started it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from modellink.config.errors import ConfigError
from modellink.device.network import VARIABLES

# what a process group takes, and may find too little of
NEEDS = {"gloo": "that the system allows more open files (ulimit -n)", "nccl": "that the GPU has memory left",
         "hccl": "that the NPU has memory left for the buffers of the group (--hccl-buffer-size sets theirs)"}
RANKS_SHOWN = 8


@contextmanager
def reporting_start(backend: str, device: str, place: str) -> Iterator[None]:
    """Around what makes a backend start: an error of its library leaves as one sentence with the way out.

    Args:
        backend: gloo, nccl or hccl.
        device: name of the device that `modellink doctor` is asked about.
        place: where it starts: `on rank 1 of 4`, and the group.

    Raises:
        ConfigError: the library raised an error.
    """
    try:
        yield
    except RuntimeError as error:  # every error of torch.distributed is one
        raise ConfigError(
            f"{backend} does not start {place}: {first_words(error)}; see that every rank is up, that its driver and "
            f"libraries are whole (modellink doctor --device {device}), {NEEDS[backend]}, and that the network "
            f"interface ({VARIABLES[backend]}) reaches the other nodes.") from error


def group_place(rank: int, description: str, ranks: Sequence[int]) -> str:
    """Where a group starts.

    Args:
        rank: this process, in the job.
        description: of the group, as megatron-core writes it: TENSOR_MODEL_PARALLEL_GROUP.
        ranks: its members, in the job.
    """
    shown = ", ".join(map(str, ranks[:RANKS_SHOWN]))
    if len(ranks) > RANKS_SHOWN:
        shown += f" and {len(ranks) - RANKS_SHOWN} more"
    group = description.lower().replace("_pg", "_group").replace("_", " ")  # torch's own is `default_pg`
    return f"on rank {rank} for the {group} ({'ranks' if len(ranks) > 1 else 'rank'} {shown})"


def first_words(error: Exception) -> str:
    """The first line of what a library says, without the place in its source."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = re.sub(r"^\[[^\]]*\S+:\d+\]\s*", "", lines[0].strip())
    return text.rstrip(".;")[:300]
