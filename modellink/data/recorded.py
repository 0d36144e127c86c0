"""prompt_template.json: with which template the weights or adapters of a folder were tuned."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modellink.config.errors import ConfigError
from modellink.config.files import read_json, write_beside
from modellink.config.settings import DataSettings
from modellink.data.blend import parse_blend
from modellink.data.sidecar import read_sidecar, template_fingerprint
from modellink.data.templates import Template

TEMPLATE_FILE = "prompt_template.json"


def template_of_data(data: DataSettings) -> dict[str, Any] | None:
    """Name and fingerprint of the template that the training data says it was made with; None when it does not say."""
    for words in (data.data_path, data.train_data_path):
        for prefix in parse_blend(words, "--data-path")[0] if words else ():
            made = (read_sidecar(prefix) or {}).get("template")
            if made is not None:
                return {"name": made["name"], "fingerprint": made["fingerprint"]}
    return None


def keep_template(data: DataSettings, folder: Path) -> None:
    """Record the template of the training data in a folder of weights or adapters."""
    found = template_of_data(data)
    if found is not None:
        with write_beside(folder / TEMPLATE_FILE) as beside:
            beside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def copy_template(source: Path, target: Path) -> None:
    """Give a folder the record of the weights or adapters that lie in `source`, where there is one."""
    found = recorded_template([source])
    if found is not None:
        target.mkdir(exist_ok=True)
        shutil.copyfile(found[1], target / TEMPLATE_FILE)


def recorded_template(folders: Iterable[Path]) -> tuple[dict[str, Any], Path] | None:
    """The first record in `folders` and its file; None when nobody recorded one.

    Raises:
        ConfigError: a record that is none of ours.
    """
    for folder in folders:
        path = folder / TEMPLATE_FILE
        if path.is_file():
            found = read_json(path)
            if not isinstance(found, dict) or not all(isinstance(found.get(key), str)
                                                      for key in ("name", "fingerprint")):
                raise ConfigError(f"{path}: not a record of a prompt template (name and fingerprint); remove it and "
                                  "give --prompt-type.")
            return found, path
    return None


def recorded_warning(folders: Iterable[Path], template: Template) -> str | None:
    """A sentence when weights or adapters were tuned with another template than the one in use."""
    found = recorded_template(folders)
    if found is None or found[0]["fingerprint"] == template_fingerprint(template):
        return None
    return (f"{found[1].parent}: tuned with the template {found[0]['name']}, and now {template.name} is used, which "
            f"puts other text around a dialogue; give --prompt-type {found[0]['name']}.")
