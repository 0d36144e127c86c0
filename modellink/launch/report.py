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
# a rank that waits for another one through HCCL: CANN's numbers for that (as torch_npu printed them in vllm-ascend's
# issues 486 and 1443), which stand above CANN's call stack, and torch_npu's own words
WAITING_NPU = re.compile(r"\bEI000[26]\b|reason=\[?suspect remote error")
# any other failure of HCCL may be its own cause or not
HCCL_FAILED = re.compile(r"HCCL function error|\bERR02200\b")


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


def exception_words(error: str) -> str:
    """Of what `own_error` gives, the last exception and all lines of its message; without a traceback the whole."""
    _, found, rest = error.rpartition(TRACEBACK)
    lines = rest.split("\n")[1:] if found else error.split("\n")
    # frames are indented
    last = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines)) if found else 0
    return "\n".join(lines[last:])


def first_failure(failures: Sequence[Failure]) -> tuple[Failure, bool]:
    """The failure that caused the others, and whether it has a cause of its own.

    A rank whose neighbour dies may notice and exit before the neighbour is done printing; so the earliest rank whose
    error is not about a lost connection counts. Next come sentences about one (a library that does not
    start has no other words for it), and calls of HCCL that fail and do not say that they waited. A traceback about a
    lost connection is a cause of nothing.
    """
    def standing(failure: Failure) -> int:
        error = own_error(failure.log)
        is_sentence = error.startswith(SENTENCE)
        words = exception_words(error)
        waited = WAITING_NPU.search(words)
        # a signal is a cause, but for the one by which torch_npu's watchdog ends the rank after these words
        if failure.code < 0 and not (waited and failure.code == -signal.SIGABRT):
            return 0
        # only the last lines name the exception; a traceback passes through files with gloo in their names
        if CONSEQUENCE.search("\n".join(error.split("\n")[-5:])) or waited:
            return 1 if is_sentence else 2
        return int(bool(HCCL_FAILED.search(words)) and not is_sentence)

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
