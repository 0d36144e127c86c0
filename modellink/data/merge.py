"""Finished token files joined into one pair for each key."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modellink.config.errors import ConfigError
from modellink.config.files import write_beside
from modellink.data.indexed import IndexedDataset, IndexedWriter
from modellink.data.sidecar import read_sidecar, sidecar_path

SAME = ("template", "tokenizer", "handler", "label_policy", "label_turns")
BATCH = 1 << 14  # documents copied at once


def find_groups(folder: Path, keys: Sequence[str]) -> list[str]:
    """The prefixes in a folder that have files for every key, sorted.

    Raises:
        ConfigError: there are none, or a prefix has files for some keys only.
    """
    if not folder.is_dir():
        raise ConfigError(f"--input {folder}: no such folder; --merge-group-keys merges the files of a folder.")
    found = {key: {path.name[:-len(f"_{key}.idx")] for path in folder.glob(f"*_{key}.idx")} for key in keys}
    for key, names in found.items():
        if not names:
            others = ", ".join(sorted(path.stem for path in folder.glob("*.idx"))[:6]) or "no token files"
            raise ConfigError(f"--merge-group-keys {key}: no file in {folder} ends in _{key}.idx, found {others}.")
        odd = sorted(names ^ found[keys[0]])
        if odd:
            raise ConfigError(f"--merge-group-keys {' '.join(keys)}: {folder / odd[0]} has files for some of the keys "
                              "only; add the missing ones or take it away.")
    return [str(folder / name) for name in sorted(found[keys[0]])]


def merge(folder: Path, keys: Sequence[str], output: str) -> list[tuple[str, int, int]]:
    """Write OUTPUT_KEY.bin and .idx for every key, and OUTPUT.json where the parts have such files.

    Returns:
        (prefix, documents, tokens) of each key.

    Raises:
        ConfigError: parts that do not fit together.
    """
    prefixes = find_groups(folder, keys)
    parts = {key: [IndexedDataset(f"{prefix}_{key}") for prefix in prefixes] for key in keys}
    for i, prefix in enumerate(prefixes):
        counts = {key: len(parts[key][i]) for key in keys}
        if len(set(counts.values())) > 1 and all(key.startswith("packed_") for key in keys):
            raise ConfigError(f"{prefix}: its streams have different numbers of documents ({counts}); preprocess it "
                              "again.")
    record = _merged_record(prefixes)
    done: list[tuple[str, int, int]] = []
    with contextlib.ExitStack() as stack:
        for key in keys:
            dtype = parts[key][0].dtype
            if any(part.dtype != dtype for part in parts[key]):
                raise ConfigError(f"--merge-group-keys {key}: the files hold tokens of different types; preprocess "
                                  "them again.")
            writer = stack.enter_context(IndexedWriter(f"{output}_{key}", dtype.type))
            for part in parts[key]:
                _copy(part, writer)
            done.append((f"{output}_{key}", writer.documents, writer.tokens))
        if record is not None:
            beside = stack.enter_context(write_beside(sidecar_path(output)))
            beside.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return done


def _copy(part: IndexedDataset, writer: IndexedWriter) -> None:
    for start in range(0, len(part), BATCH):
        sizes = np.asarray(part.sizes[start:start + BATCH])
        # documents lie one after the other: a run of them is one stretch of the file
        writer.append(part.get(start, 0, int(sizes.sum(dtype=np.int64))), sizes)


def _merged_record(prefixes: Sequence[str]) -> dict[str, Any] | None:
    records = {prefix: read_sidecar(prefix) for prefix in prefixes}
    known = {prefix: record for prefix, record in records.items() if record is not None}
    if not known:
        return None
    first_prefix, first = next(iter(known.items()))
    for prefix, record in known.items():
        for field in SAME:
            mine, other = _identity(record.get(field)), _identity(first.get(field))
            if mine != other:
                raise ConfigError(f"{prefix}: made with {field} {_name(record.get(field))}, {first_prefix} with "
                                  f"{_name(first.get(field))}; merge only files that were made alike.")
    if len(known) < len(records):
        return None
    counts: dict[str, int] = {}
    for record in known.values():
        for name, count in record["counts"].items():
            counts[name] = counts.get(name, 0) + count
    return {**first, "counts": counts, "merged": [Path(prefix).name for prefix in prefixes]}


def _identity(value: Any) -> Any:
    return value["fingerprint"] if isinstance(value, dict) else value


def _name(value: Any) -> Any:
    return value.get("name") or value.get("path") if isinstance(value, dict) else value
