"""Runs numbered steps, each a command that the reader can copy, and stops at the first that fails."""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class StepFailed(Exception):
    """A command ended with an error, which it has printed itself.

    Attributes:
        code: its exit code; 128 + the signal's number when a signal ended it, as in a shell.
    """

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code if code > 0 else 128 - code


@dataclass(frozen=True)
class Step:
    """One step: what it does, and the command that does it."""

    title: str
    command: tuple[str, ...]


def run_steps(steps: Sequence[Step], folder: Path) -> list[float]:
    """Run the commands in `folder`, one after another; returns the seconds of each.

    Raises:
        StepFailed: a command did not end with exit code 0; later ones are not started.
    """
    seconds = []
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {step.title}\n\n{shown(step.command)}\n", flush=True)
        begin = time.perf_counter()
        code = subprocess.run(step.command, cwd=folder).returncode
        if code != 0:
            print(f"\nstep {number} of {len(steps)} failed with exit code {code}: {step.title}", file=sys.stderr)
            raise StepFailed(code)
        seconds.append(time.perf_counter() - begin)
        print(f"({seconds[-1]:.1f} s)", flush=True)
    return seconds


def shown(command: Sequence[str], width: int = 110) -> str:
    """A command as a shell reads it, to be copied whole; broken before flags where a line would pass `width`."""
    lines: list[str] = []
    line = "   "
    for group in _flag_groups(command):
        if len(line) + 1 + len(group) > width and line.strip():
            lines.append(line + " \\")
            line = "       "
        line += " " + group
    return "\n".join([*lines, line])


def _flag_groups(command: Sequence[str]) -> list[str]:
    """The words, quoted, each flag together with its values."""
    groups: list[str] = []
    for word in command:
        quoted = shlex.quote(word)
        if groups and groups[-1].startswith("--") and not word.startswith("--"):
            groups[-1] += " " + quoted
        else:
            groups.append(quoted)
    return groups
