"""Which rank failed first, and its own error, from exit codes and the ends of log files."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 200_000
TAIL_LINES = 20  # shown when a log ends without a traceback
TRACEBACK = "Traceback (most recent call last)"
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch puts it before every line of a traceback
CHAINS = ("During handling of the above exception", "The above exception was the direct cause")
# what a healthy rank says when its neighbour is gone
SENTENCE = "error: "  # run_command writes it before what a user did wrong
CONSEQUENCE = re.compile(
    r"connection (closed|reset|refused)|closed by (remote )?peer|broken pipe|socket closed|remote process exited|"
    r"recvvalue failed|sendbytes failed|failed to recv, got 0 bytes|gloo[/:]|timed out waiting|watchdog|"
    r"distnetworkerror|process group .*(abort|destroyed)", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """A rank that ended with something else than 0.

    Attributes:
        rank: global rank.
        code: its return code; negative for a signal.
        seconds: when it was noticed, on the monotonic clock.
        log: its log file.
    """

    rank: int
    code: int
    seconds: float
    log: Path

    @property
    def exit_code(self) -> int:
        """As a shell reports it: 128 + signal for a killed rank."""
        return 128 - self.code if self.code < 0 else self.code

    def how(self) -> str:
        if self.code >= 0:
            return f"exit code {self.code}"
        return f"killed by {signal.Signals(-self.code).name}"


def own_error(log: Path) -> str:
    """What a log's end says of why its rank ended: the last traceback with its chain, `error:` lines, or the tail."""
    try:
        with open(log, "rb") as handle:
            handle.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = handle.read().decode("utf-8", "replace").replace("\r", "\n").rstrip()
    except FileNotFoundError:
        return ""
    lines = [RANK_PREFIX.sub("", line) for line in text.split("\n")]
    starts = [i for i, line in enumerate(lines) if line.startswith(TRACEBACK)]
    if not starts:
        errors = [line for line in lines if line.startswith(SENTENCE)]
        return "\n".join(errors or lines[-TAIL_LINES:])
    first = starts.pop()
    while starts and any(line.startswith(CHAINS) for line in lines[starts[-1]:first]):
        first = starts.pop()
    return "\n".join(lines[first:])


def first_failure(failures: Sequence[Failure]) -> tuple[Failure, bool]:
    """The failure that caused the others, and whether it has a cause of its own.

    A rank whose neighbour dies may notice and exit before the neighbour is done printing; so the earliest rank whose
    error is not about a lost connection counts. Next come sentences about one: a library that does not start has no
    other words for it. A traceback about one is a cause of nothing.
    """
    def standing(failure: Failure) -> int:
        error = own_error(failure.log)
        # only the last lines name the exception; a traceback passes through files with gloo in their names
        if failure.code < 0 or not CONSEQUENCE.search("\n".join(error.split("\n")[-5:])):
            return 0
        return 1 if error.startswith(SENTENCE) else 2

    in_time = sorted(failures, key=lambda failure: failure.seconds)
    first = min(in_time, key=standing)
    return first, standing(first) < 2


def failure_report(failures: Sequence[Failure], stopped: Sequence[int], finished: Sequence[int],
                   nnodes: int) -> tuple[str, int]:
    """The message for the terminal and the job's exit code.

    Args:
        failures: the ranks that ended by themselves.
        stopped: the ranks that were still running and had to be stopped.
        finished: the ranks that had ended with 0 by then.
        nnodes: nodes of the job.
    """
    first, own = first_failure(failures)
    lines = []
    error = own_error(first.log)
    if first.code == -signal.SIGKILL:
        error += "\n(SIGKILL that nobody sent is usually the kernel: the host ran out of memory.)"
    if not own:
        cause = ("look into the logs of the other nodes" if nnodes > 1 else
                 f"rank {', '.join(map(str, finished))} ended before them with exit code 0" if finished else
                 "no rank reports a cause of its own")
        lines.append(f"every failed rank of this node lost its connection: {cause}.")
    lines.append(f"rank {first.rank} failed first ({first.how()}); the end of {first.log}:")
    lines.append(error.strip("\n"))
    others = [f"rank {failure.rank} ({failure.how()})" for failure in sorted(failures, key=lambda item: item.rank)
              if failure.rank != first.rank]
    others += [f"rank {rank} (stopped)" for rank in stopped]
    if others:
        lines.append(f"after it ended: {', '.join(others)}.")
    return "\n".join(lines), first.exit_code
