"""Writes the files of a conversion side by side in worker processes."""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from modellink.checkpoint.checksums import Sums
from modellink.checkpoint.chunks import Source
from modellink.config.errors import ConfigError

REPORT_BYTES = 64 << 20  # a worker tells its progress after this many bytes


class Job(Protocol):
    """Files to write; it is pickled to reach the workers."""

    @property
    def parts(self) -> Sequence[Any]:
        """What can be written apart from each other."""

    def write(self, source: Source, parts: Sequence[Any], sums: Sums) -> Iterator[int]:
        """Write some parts; yields bytes as they go and notes the checksums of the files in `sums`."""


def write_parts(job: Job, source: Source, reopen: Callable[[], Source], workers: int, sums: Sums) -> Iterator[int]:
    """Write every part of `job` in up to `workers` processes; yields bytes as they go.

    Args:
        source: used when one process is enough.
        reopen: opens the source again in a worker; it is pickled.
        sums: filled with the checksums of all files.
    """
    parts = job.parts
    count = min(workers, len(parts))
    if count <= 1:
        yield from job.write(source, parts, sums)
        return
    # spawned, not forked: a fork of a process whose math library has threads can hang
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for number in range(count):
            ours, theirs = context.Pipe(duplex=False)
            share = parts[number * len(parts) // count:(number + 1) * len(parts) // count]
            process = context.Process(target=_work, args=(theirs, job, reopen, share), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        yield from _collect(pipes, sums)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], sums: Sums) -> Iterator[int]:
    """Messages of the workers: a number is bytes written, a dictionary the checksums at the end, else an error."""
    open_pipes = list(pipes)
    while open_pipes:
        for pipe in wait(open_pipes):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except EOFError as error:
                raise RuntimeError("a worker process ended in the middle of its work") from error
            if isinstance(message, int):
                yield message
            elif isinstance(message, dict):
                sums.update(message)
                open_pipes.remove(pipe)
            elif isinstance(message, (ConfigError, OSError)):
                raise message
            else:
                raise RuntimeError(f"a worker process failed:\n{message}")


def _work(pipe: Connection, job: Job, reopen: Callable[[], Source], parts: Sequence[Any]) -> None:
    """A worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sums: Sums = {}
    size = 0
    try:
        for written in job.write(reopen(), parts, sums):
            size += written
            if size >= REPORT_BYTES:
                pipe.send(size)
                size = 0
        pipe.send(size)
        pipe.send(sums)
    except ConfigError as error:
        pipe.send(ConfigError(error.problems))
    except OSError as error:
        pipe.send(OSError(error.errno, error.strerror))
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


def _end_with_parent() -> None:
    """A killed parent must not leave workers that go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
