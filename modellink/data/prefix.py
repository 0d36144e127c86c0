"""What to suggest when no data set lies at the prefix that was asked for."""

import difflib
from pathlib import Path

from modellink.config.files import near_path_hint


def _prefixes(folder: Path) -> list[str]:
    return [str(path)[:-len(".idx")] for path in sorted(folder.glob("*.idx"))]


def missing_prefix_hint(prefix: str) -> str:
    """`"; did you mean ...?"` with the nearest data set: same folder, a folder below it or a sibling of it."""
    path = Path(prefix)
    folder = path if path.is_dir() else path.parent
    if not folder.parent.is_dir():
        return near_path_hint(path)
    roots = [folder, *(folder.parent / entry.name for entry in sorted(folder.parent.iterdir()) if entry.is_dir())]
    if folder.is_dir():
        roots += [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
    found = [name for root in dict.fromkeys(roots) for name in _prefixes(root)]
    # the same name elsewhere, then a name that goes on: "alpaca" for alpaca_text_document
    longer = sorted((name for name in found if Path(name).name.startswith(path.name)),
                    key=lambda name: len(Path(name).name))
    by_name = {Path(name).name: name for name in reversed(found)}
    similar = [by_name[name] for name in difflib.get_close_matches(path.name, list(by_name), n=1, cutoff=0.5)]
    for candidates in (longer, similar):
        if candidates:
            return f"; did you mean {candidates[0]}?"
    return near_path_hint(path)
