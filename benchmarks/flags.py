"""Flags that several benchmarks have, and what is checked before anything is measured."""

import argparse
import shlex
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from modellink.config.errors import ConfigError  # noqa: E402
from modellink.config.files import disk_error  # noqa: E402
from modellink.config.settings import parse_settings  # noqa: E402

PRECISIONS = ("fp32", "bf16")


def number(word: str) -> int:
    """A whole number above 0."""
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


def add_place(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--clock`."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "npu"), help="where to run")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="seconds on the clock, or CPU seconds "
                        "of the process (on the CPU): for a machine that others use too, with one thread")


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """`--output`, by default a file in benchmarks/results."""
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "results" / name,
                        help=f"JSON file of the numbers (default: benchmarks/results/{name})")


def check_place(options: argparse.Namespace) -> None:
    """Raises:
        ConfigError: the device cannot be used here, or its work is no CPU time.
    """
    if options.device == "cpu":
        return
    if options.clock == "cpu":
        raise ConfigError(f"--clock cpu with --device {options.device}: an accelerator's work is no CPU time of the "
                          "process; leave --clock out.")
    from modellink.device.select import select_device  # imports torch

    select_device(options.device)


def check_further_flags(words: str) -> None:
    """Raises:
        ConfigError: `--flags` holds what no program of modellink knows.
    """
    try:
        parse_settings("--flags", "", shlex.split(words))
    except ValueError as error:
        raise ConfigError(f"--flags {words!r}: {error}; quote it as in a shell.") from None


def open_output(path: Path) -> None:
    """Make the folder of the result, before minutes are spent on measuring.

    Raises:
        ConfigError: nothing can be written there.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file for the result.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from None
