"""File habits every room shares: writing beside and renaming, and recognising files that are not what they claim."""

import difflib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modellink.config.errors import ConfigError


@contextmanager
def write_beside(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` when the block ends, remove it when it fails.

    The temporary path may be made a file or a folder by the block. A full disk becomes a ConfigError.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{socket.gethostname()}.{os.getpid()}.part"  # nodes may share the disk
    remove(beside)
    try:
        yield beside
        if beside.is_file():
            with open(beside, "rb") as handle:
                os.fsync(handle.fileno())
        if target.is_dir() and beside.is_dir():
            shutil.rmtree(target)
        os.replace(beside, target)
    except OSError as error:
        remove(beside)
        raise disk_error(target, error) from error
    except BaseException:
        remove(beside)
        raise


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def disk_error(path: Path, error: OSError) -> ConfigError:
    """The sentence for a failed write."""
    return ConfigError(f"{path}: cannot write: {error.strerror or error}; free space or choose another folder; "
                       "nothing was left behind.")


def placeholder_kind(path: Path) -> str | None:
    """What a small text file really is when it only stands in for the real one: an HTML page or a git-lfs pointer."""
    with open(path, "rb") as handle:
        head = handle.read(512).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page (the download saved the web page, not the file)"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer (the real file was not fetched; run `git lfs pull`)"
    return None


def check_real(path: Path) -> Path:
    """Raise a ConfigError when the file is missing, empty or a stand-in; return the path otherwise."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file{near_path_hint(path)}.")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path}: the file is empty; fetch it again.")
    kind = placeholder_kind(path)
    if kind:
        raise ConfigError(f"{path}: this is {kind}; fetch the real file.")
    return path


def read_json(path: Path) -> Any:
    """Parse a JSON file; every way it can be wrong is one sentence."""
    path = check_real(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}); it cannot be a JSON file.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}; "
                          "fetch the file again.") from error


def near_path_hint(path: Path) -> str:
    """`"; did you mean ...?"` with the nearest existing neighbour, or an empty string."""
    path = Path(path)
    parent = path.parent
    if not parent.is_dir():
        while not parent.is_dir():
            parent = parent.parent
        return f" (the last folder that exists on the way is {parent})"
    names = sorted(entry.name for entry in parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {parent / near[0]}?" if near else ""
