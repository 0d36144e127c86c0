"""PREFIX.json: how the token files of instruction data were made."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.config.errors import ConfigError
from modellink.config.files import read_json
from modellink.data.dialogue import Dialogue, Turn
from modellink.data.templates import SINGLE_TOKENS, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
# what every part of a template takes part in
PROBES = (Dialogue((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))),
          Dialogue((Turn("user", "a"), Turn("assistant", "b")), system="s"))


def sidecar_path(prefix: str | Path) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def template_fingerprint(template: Template) -> str:
    """Equal for two templates that put the same text and tokens around a dialogue, whatever they are called."""
    rendered = []
    for probe in PROBES:
        runs: list[list[str]] = []
        for piece in template.render(probe):
            kind = "token" if piece.part in SINGLE_TOKENS else "text"
            if kind == "text" and runs and runs[-1][0] == "text":
                runs[-1][1] += piece.text
            else:
                runs.append([kind, piece.text])
        rendered.append(runs)
    return hashlib.sha256(json.dumps(rendered).encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Equal for two tokenizers with the same words."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def describe_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What a sidecar says about the tokenizer."""
    return {"path": str(tokenizer.name_or_path), "words": len(tokenizer),
            "fingerprint": tokenizer_fingerprint(tokenizer)}


def describe_template(template: Template) -> dict[str, Any]:
    """What a sidecar says about the template."""
    return {"name": template.name, "fingerprint": template_fingerprint(template)}


def read_sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """The sidecar of a prefix; None where there is none, as with files of other programs.

    Raises:
        ConfigError: it is not one of ours.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"{path}: not a description that tools/preprocess_data.py wrote (format {FORMAT}); move it "
                          "away or preprocess the data again.")
    return found


def template_warning(prefix: str | Path, template: Template) -> str | None:
    """A sentence when the data at `prefix` was made with another template; None when it was not, or nobody knows."""
    made = (read_sidecar(prefix) or {}).get("template")
    if made is None or made["fingerprint"] == template_fingerprint(template):
        return None
    return (f"{prefix}: made with the template {made['name']}, and now {template.name} is used, which puts other text "
            f"around a dialogue; give --prompt-type {made['name']}.")


def tokenizer_warning(prefix: str | Path, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A sentence when the data at `prefix` was made with another tokenizer; None when not, or nobody knows."""
    made = (read_sidecar(prefix) or {}).get("tokenizer")
    if made is None or made["fingerprint"] == tokenizer_fingerprint(tokenizer):
        return None
    return (f"{prefix}: made with the tokenizer {made['path']} ({made['words']} words), which is not the one of "
            f"{tokenizer.name_or_path}; preprocess the data with this model's tokenizer.")
