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
LONGEST = 300  # characters of what a library says, and of the reason that stands further down
# where a library's words come from in its source: `[/pytorch/....cpp:12] ` or `createHCCLComm:build/....ts:102 `
PLACE = re.compile(r"^(\[[^\]]*\S+:\d+\]\s*|\w+:\S+:\d+\s+)")
# CANN numbers its reasons (EI0006, EL0004), with the process and the time behind the number; its own failures (EE9999)
# have a headline that says nothing
CANN_REASON = re.compile(r"\bE[A-Z]\d{4}\b(?!: Inner Error!).*")
CANN_STAMP = re.compile(r"(: )?\[PID: \d+\]|\d{4}(-\d\d){3}:\d\d:\d\d\.[\d.]+ ")
CANN_MORE = ("Possible Cause:", "Solution:")
NCCL_REASON = "Last error:"
TORCH_STACK = "Exception raised from"


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
    """The first line of what a library says, without the place in its source, and the reason that CANN and NCCL give on
    later lines; each of at most `LONGEST` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    words = [PLACE.sub("", lines[0])[:LONGEST], _reason(lines[1:])[:LONGEST]]
    return ": ".join(text.rstrip(".;: ") for text in words if text)


def _reason(lines: Sequence[str]) -> str:
    """What follows NCCL's `Last error:`, or the line with the first number of CANN and what it says of the cause and
    the way out; empty where there is neither."""
    for i, line in enumerate(lines):
        if line.startswith(NCCL_REASON):
            words = [line.removeprefix(NCCL_REASON).strip(), *lines[i + 1:i + 2]]
            return next((word for word in words if word and not word.startswith(TORCH_STACK)), "")
        found = CANN_REASON.search(line)
        if found:
            more = [line for line in lines[i + 1:i + 1 + len(CANN_MORE)] if line.startswith(CANN_MORE)]
            return " ".join([re.sub(r"\s+", " ", CANN_STAMP.sub(" ", found[0])), *more])
    return ""
