"""Index arrays kept on disk between runs: built once per node, mapped by every rank."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


def _save(path: Path, array: np.ndarray) -> None:
    # unique also across nodes that share the folder: every node's first rank may build at the same time
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(beside, "wb") as handle:
            np.save(handle, array)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def cached_arrays(folder: Path | None, kind: str, key: dict[str, Any], names: Sequence[str],
                  compute: Callable[[], Sequence[np.ndarray]], build: bool) -> list[np.ndarray]:
    """The arrays `names`, from the cache where it has them, otherwise computed.

    Args:
        folder: the cache folder; None computes in memory.
        kind: first part of the file names.
        key: everything the arrays depend on, the data's content included; its hash names the files, so a
            cache of other data or settings is never read.
        names: one name per array.
        compute: makes the arrays, the same ones for the same key.
        build: this process writes what is missing. One process per node does; the others call after it,
            read the files, and compute for themselves (with a warning) only when they could not be written.
    """
    if folder is None:
        return list(compute())
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    paths = [folder / f"{digest}-{kind}-{name}.npy" for name in names]
    if not all(path.is_file() for path in paths):
        arrays = list(compute())
        if not build:
            _warn_once(f"{folder}: the index cache was not built on this node; this rank keeps its own in memory.")
            return arrays
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, array in zip(paths, arrays):
                _save(path, array)
        except OSError as error:
            _warn_once(f"{folder}: cannot write the index cache ({error.strerror or error}); every rank keeps its own "
                       "in memory, --data-cache-path moves the cache to a folder that can be written.")
            return arrays
    return [np.load(path, mmap_mode="r") for path in paths]


def content_hash(sizes: np.ndarray) -> str:
    """Fingerprint of a data set for index caches: the lengths of its documents are all that an index depends on."""
    return hashlib.sha256(np.ascontiguousarray(sizes).data).hexdigest()
