"""Starts the ranks of this node through torch's elastic launcher, watches them and ends them together."""

import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext, start_processes

from modellink.launch.options import LaunchOptions
from modellink.launch.report import Failure, failure_report

POLL_SECONDS = 0.1
SETTLE_SECONDS = 3.0  # after the first failure: the rank that caused it may still be printing its own error
STOP_SECONDS = 5.0  # between SIGTERM and SIGKILL for ranks whose job has failed
HOLD_SECONDS = 5.0  # how long an error on the terminal waits: it may be the consequence of another rank's
INSIST_TIMES, INSIST_SECONDS = 3, 2.0  # so many interrupts within this time end a job that handles single ones itself
INTERRUPTED = 128 + signal.SIGINT
LINE_END = re.compile(rb"(?<=[\n\r])")
ERROR_WORDS = (b"Traceback (most recent call last)", b"error: ")
ERROR_START = re.compile(rb"(\[rank\d+\]: ?)?(" + b"|".join(map(re.escape, ERROR_WORDS)) + b")")
RANK_MARK = b"[rank"
PORTS = range(15000, 32000)  # free_port takes one of these


def may_become_error(start: bytes) -> bool:
    """Whether a line that begins like this may still turn out to be the first of an error."""
    return any(word.startswith(start) or start.startswith(word) for word in (*ERROR_WORDS, RANK_MARK))


class RankOutput(threading.Thread):
    """Copies what one rank prints to its log file, and to the terminal when `echo`.

    An error is held back from the terminal until it is clear whether it is the first one of the job. Anything else is
    shown as it comes, also within a line: it may be an answer that is being written, or a question to the user.
    """

    def __init__(self, log: Path, echo: bool):
        super().__init__(daemon=True)
        self.log = log
        self._file: BinaryIO = open(log, "wb", buffering=0)  # noqa: SIM115
        self._echo = echo
        self._read_end, self.write_end = os.pipe()
        self._held: list[bytes] = []
        self._held_since = 0.0
        self._lock = threading.Lock()

    def run(self) -> None:
        rest, begun = b"", False  # what is not shown yet; whether the line of it is already on the terminal
        while data := os.read(self._read_end, 65536):
            self._file.write(data)
            if self._echo:
                *whole, rest = LINE_END.split(rest + data)
                for line in whole:
                    self._show(line, begun)
                    begun = False
                if rest and (begun or not may_become_error(rest)):
                    self._show(rest, begun)
                    rest, begun = b"", True
        if rest:
            self._show(rest, begun)
        self._file.close()
        os.close(self._read_end)

    def _show(self, text: bytes, within: bool) -> None:
        """Show a line, the start of one, or what follows `within` one whose start was shown."""
        with self._lock:
            if self._held or (not within and ERROR_START.match(text)):
                self._held_since = self._held_since if self._held else time.monotonic()
                self._held.append(text)
            else:
                _write(text)

    def release(self, older_than: float = 0.0) -> None:
        """Print what was held back for at least `older_than` seconds."""
        with self._lock:
            if self._held and time.monotonic() - self._held_since >= older_than:
                _write(b"".join(self._held))
                self._held = []


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


class PipeLogs(LogsSpecs):
    """Sends both streams of each rank into one pipe, so that a log file has them in the order they were printed."""

    def __init__(self, outputs: Sequence[RankOutput]):
        super().__init__()
        self._outputs = outputs

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        paths = {i: f"/proc/self/fd/{output.write_end}" for i, output in enumerate(self._outputs)}
        return LogsDest(stdouts=dict(paths), stderrs=dict(paths), error_files=dict.fromkeys(paths, os.devnull))

    @property
    def root_log_dir(self) -> str:
        return str(self._outputs[0].log.parent)


class Ranks:
    """The ranks of this node.

    Args:
        options: nodes, addresses and folders.
        nproc: ranks on this node.
        command: the program of every rank and its arguments. Standard input is theirs; rank 0 is the one to read it.
        passes_interrupts: Ctrl-C is for the ranks: it ends an answer, and the job only when they decide so.
    """

    def __init__(self, options: LaunchOptions, nproc: int, command: Sequence[str], *,
                 passes_interrupts: bool = False):
        self.options = options
        self._passes_interrupts = passes_interrupts
        self._interrupts: list[float] = []
        self._passed = 0
        self.first_rank = options.node_rank * nproc
        folder = Path(options.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [RankOutput(folder / f"rank_{self.first_rank + i}.log", echo=i == 0) for i in range(nproc)]
        self._command = list(command)
        self._environments = rank_environments(options, nproc)
        self._context: SubprocessContext | None = None
        self._signal: int | None = None
        self._hurry = False
        self._codes: dict[int, int] = {}
        self._failures: dict[int, Failure] = {}

    def run(self) -> int:
        """Run to the end; returns the exit code of the job."""
        self._start()
        try:
            while len(self._codes) < len(self.outputs):
                if self._signal is not None:
                    return self._wind_down(self._signal)
                while self._passed < len(self._interrupts):
                    self._passed += 1
                    self._send(signal.SIGINT)
                self._poll()
                if self._failures:
                    return self._fail()
                self.outputs[0].release(HOLD_SECONDS)
                time.sleep(POLL_SECONDS)
            if self._failures:
                return self._fail()
            self._drain()
            return 0
        finally:
            self._kill()

    def _start(self) -> None:
        context = start_processes("rank", self._command[0],
                                  {i: tuple(self._command[1:]) for i in self._environments}, self._environments,
                                  PipeLogs(self.outputs))
        assert isinstance(context, SubprocessContext)
        self._context = context
        for number in (signal.SIGTERM, signal.SIGINT):  # replaces torch's, which know no grace
            signal.signal(number, self._on_signal)
        for output, handler in zip(self.outputs, context.subprocess_handlers.values()):
            for stream in (handler._stdout, handler._stderr):
                if stream is not None:
                    stream.close()
            os.close(output.write_end)  # only the rank holds its end now, so its exit ends the copying
            output.start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._passes_interrupts and self._signal is None:
            self._interrupts.append(time.monotonic())
            recent = self._interrupts[-INSIST_TIMES:]
            if len(recent) < INSIST_TIMES or recent[-1] - recent[0] > INSIST_SECONDS:
                return
        self._hurry = self._signal is not None
        self._signal = number

    def _running(self) -> list[int]:
        return [i for i in range(len(self.outputs)) if i not in self._codes]

    def _poll(self) -> None:
        assert self._context is not None
        for i in self._running():
            code = self._context.subprocess_handlers[i].proc.poll()
            if code is not None:
                self._codes[i] = code
                if code != 0:
                    self._failures[i] = Failure(self.first_rank + i, code, time.monotonic(), self.outputs[i].log)

    def _wait(self, seconds: float) -> None:
        """Wait until every rank has ended, but not longer; a second signal ends it too."""
        end = time.monotonic() + seconds
        while self._running() and time.monotonic() < end and not self._hurry:
            time.sleep(POLL_SECONDS)
            self._poll()

    def _send(self, number: int) -> None:
        assert self._context is not None
        for i in self._running():
            # the rank alone: its helper processes must live until it has saved
            self._context.subprocess_handlers[i].proc.send_signal(number)

    def _kill(self) -> None:
        """End what still runs, helper processes included."""
        if self._context is None:
            return
        for i, handler in self._context.subprocess_handlers.items():
            try:
                os.killpg(handler.proc.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            if i not in self._codes:
                self._codes[i] = handler.proc.wait()

    def _drain(self, show: bool = True) -> None:
        for output in self.outputs:
            output.join(timeout=2.0)
            if show:
                output.release()

    def _fail(self) -> int:
        if self._interrupts and all(failure.exit_code == INTERRUPTED for failure in self._failures.values()):
            self._send(signal.SIGTERM)  # a rank left because of an interrupt that it was passed: nothing has failed
            self._wait(STOP_SECONDS)
            self._kill()
            self._drain(show=False)
            return INTERRUPTED
        self._wait(SETTLE_SECONDS)
        failures, stopped = list(self._failures.values()), self._running()
        finished = [self.first_rank + i for i, code in self._codes.items() if code == 0]
        self._send(signal.SIGTERM)
        self._wait(STOP_SECONDS)
        self._kill()
        self._drain(show=False)
        message, code = failure_report(failures, [self.first_rank + i for i in stopped], finished,
                                       self.options.nnodes)
        print(message, file=sys.stderr, flush=True)
        return code

    def _wind_down(self, number: int) -> int:
        name = signal.Signals(number).name
        print(f"{name}: waiting up to {self.options.grace_period:g} s for the ranks to save and exit.",
              file=sys.stderr, flush=True)
        self._send(number)
        self._wait(self.options.grace_period)
        late = [str(self.first_rank + i) for i in self._running()]
        self._kill()
        self._drain()
        if late:
            print(f"rank {', '.join(late)} did not exit in time and had to be killed.", file=sys.stderr, flush=True)
            return 128 + number
        others = [failure for failure in self._failures.values() if failure.code != -number]
        if number == signal.SIGTERM and others:
            message, code = failure_report(others, [], [], self.options.nnodes)
            print(message, file=sys.stderr, flush=True)
            return code
        return 128 + number if self._failures else 0


def rank_environments(options: LaunchOptions, nproc: int) -> dict[int, dict[str, str]]:
    """Environment variables of each rank of this node, as torch.distributed's env:// start reads them."""
    port = options.master_port if options.master_port is not None else free_port()
    shared = {
        "MASTER_ADDR": options.master_addr,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(options.nnodes * nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": str(options.node_rank),
        "GROUP_WORLD_SIZE": str(options.nnodes),
        "PYTHONUNBUFFERED": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "0"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // nproc)),
    }
    return {i: {**shared, "RANK": str(options.node_rank * nproc + i), "LOCAL_RANK": str(i)} for i in range(nproc)}


def free_port() -> int:
    """A TCP port that nothing listens on.

    It is below those that a kernel gives to connections and to whoever asks for any: seconds pass until rank 0 listens.
    """
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # taken
                continue
            return port
