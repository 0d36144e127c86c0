"""Tokenizers: always from a local folder, never from a hub."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.config.errors import ConfigError
from modellink.config.files import check_real, near_path_hint, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# any one of these rows is a vocabulary that transformers can build a tokenizer from
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
JSON_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "config.json")
END_OF_DOCUMENT = "<|endoftext|>"


def check_tokenizer_folder(path: str | Path) -> Path:
    """Raise a ConfigError unless `path` is a folder whose tokenizer files are complete and real; return it."""
    folder = Path(path)
    if folder.is_file():
        raise ConfigError(f"{folder}: a tokenizer is a folder, this is a file; give its folder {folder.parent}.")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such tokenizer folder{near_path_hint(folder)}.")
    complete = [row for row in VOCABULARIES if all((folder / name).is_file() for name in row)]
    if not complete:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(f"{folder}: no tokenizer files; tokenizer.json, or vocab.json with merges.txt, or "
                          f"tokenizer.model is needed, found {found}.")
    for name in dict.fromkeys((*JSON_FILES, *(name for row in complete for name in row))):
        if (folder / name).is_file():
            read_json(folder / name) if name.endswith(".json") else check_real(folder / name)
    return folder


def load_tokenizer(path: str | Path, *, use_fast: bool = True) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a Hugging Face folder.

    Args:
        path: a local folder with tokenizer.json, or vocab.json and merges.txt, or tokenizer.model.
        use_fast: ask for the Rust tokenizer; transformers 5 has no other and ignores this.

    Raises:
        ConfigError: the folder is missing, has no tokenizer files, or they are stand-ins or broken.
    """
    folder = check_tokenizer_folder(path)
    from transformers import AutoTokenizer  # seconds to import: after the checks

    try:
        return AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True, use_fast=use_fast)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder}: transformers cannot load this tokenizer ({reason}); "
                          "fetch the tokenizer files of the model again.") from error


def eod_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that ends a document: `<|endoftext|>` where the vocabulary has it, otherwise the end-of-sequence token.

    Raises:
        ConfigError: the tokenizer has neither.
    """
    token = tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT)
    # an unknown token maps to the id of the unknown token, which is another word
    if isinstance(token, int) and tokenizer.convert_ids_to_tokens(token) == END_OF_DOCUMENT:
        return token
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{tokenizer.name_or_path}: the tokenizer has neither {END_OF_DOCUMENT} nor an eos token; "
                          "add eos_token to its tokenizer_config.json.")
    return int(tokenizer.eos_token_id)
