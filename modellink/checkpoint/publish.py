"""Puts finished outputs in place: nothing half-written is ever visible under its final name."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modellink.config.errors import ConfigError
from modellink.config.files import disk_error, remove


def refuse_existing(target: Path, entries: Iterable[str], overwrite: bool) -> None:
    """Raise a ConfigError when `target` already holds something and `overwrite` was not asked."""
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: is a file, but a folder is to be written there; choose another folder.")
    if not target.is_dir() or not any(target.iterdir()) or overwrite:
        return
    held = sorted(set(entries) & {path.name for path in target.iterdir()})
    what = f"already holds {held[0]}" if held else "is not empty"
    raise ConfigError(f"{target}: {what}; choose another folder, or give --overwrite to replace it.")


def require_space(target: Path, needed: int) -> None:
    """Raise a ConfigError when the disk of `target` has less than `needed` bytes free."""
    folder = target
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(f"{target}: needs {needed / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free on that disk; "
                          "free space or choose another folder; nothing was written.")


@contextmanager
def publish_folder(target: Path, stale: Iterable[Path] = (), last: str | None = None) -> Iterator[Path]:
    """Yield a folder beside `target`; when the block ends move it, or each of its entries, into place.

    An absent or empty `target` is created by one rename. In a `target` that holds other files only the entries
    written are replaced and the paths `stale` removed; the entry `last` comes last (the tracker of a checkpoint).
    Whatever fails, the folder beside is removed, and so are parent folders made for it.
    """
    target = Path(os.path.abspath(target))
    created = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    beside = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        yield beside
        if not target.exists():
            os.replace(beside, target)
        else:
            for path in stale:
                remove(path)
            for entry in sorted(beside.iterdir(), key=lambda path: (path.name == last, path.name)):
                remove(target / entry.name)
                os.replace(entry, target / entry.name)
            beside.rmdir()
    except BaseException as error:
        remove(beside)
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise disk_error(target, error) from error
        raise
