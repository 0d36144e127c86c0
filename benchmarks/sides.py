"""Sides of a comparison: processes of their own, whose last line of output is JSON, and the check that they agree."""

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink.config.errors import ConfigError

# largest difference of two losses, in the first step and after updates. Measured, 8 steps of the small model: 2e-6 in
# fp32 and 1e-3 in bf16; another rope base moved them by 6e-3, half the learning rate by 1e-3 (4 steps of 64 tokens)
LOSS_LIMITS = {"fp32": (2e-4, 2e-4), "bf16": (5e-3, 2e-2)}


def peak_memory() -> int:
    """Peak resident bytes of this whole process, libraries included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def peak_bytes(device: Any) -> int:
    """Peak bytes of this process on its device: resident on the CPU, the allocator's elsewhere."""
    return peak_memory() if device.name == "cpu" else device.peak_memory()


def run_side(command: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one side in its own process and return its numbers.

    Raises:
        ConfigError: the side refused what the user asked for.
        RuntimeError: the side failed.
    """
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise failure(command[1], done.returncode, done.stderr)
    return numbers(done.stdout)


def numbers(output: str) -> dict[str, Any]:
    """The numbers that a side printed."""
    found: dict[str, Any] = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith('{"')))
    return found


def failure(name: str, code: int, errors: str) -> Exception:
    """What to raise for a side that ended early: its own sentences where it blames the user."""
    sentences = [line.removeprefix("error: ") for line in errors.splitlines() if line.startswith("error: ")]
    if code == 2 and sentences:
        return ConfigError(sentences)
    return RuntimeError(f"{name} ended with exit code {code}: {errors[-3000:]}")


def largest(found: Sequence[float]) -> float:
    """The largest number, or NaN where one is: `max` passes over it."""
    return next((value for value in found if math.isnan(value)), max(found))


def require_same_losses(ours: Sequence[float], peer: Sequence[float], precision: str) -> float:
    """Largest difference of the losses of two runs; the program ends where they did not compute the same."""
    differences = [abs(own - other) for own, other in zip(ours, peer, strict=True)]
    difference = largest(differences)
    first, later = LOSS_LIMITS[precision]
    if not (differences[0] <= first and difference <= later):
        raise SystemExit(f"the losses {list(ours)} and {list(peer)} differ by {difference:.1e}, which rounding in "
                         f"{precision} does not explain: the two sides do not compute the same")
    return difference
