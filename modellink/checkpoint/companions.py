"""Keeps config.json and tokenizer files inside a checkpoint, so that it can be exported without anything else."""

import json
from pathlib import Path

import torch

from modellink.checkpoint.convert import copy_companions
from modellink.checkpoint.saved_args import dtype_name
from modellink.checkpoint.sources import is_hf_folder
from modellink.config.files import read_json, write_beside
from modellink.config.model import ModelConfig

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")  # a folder with one of them has a tokenizer


def keep_companions(model: ModelConfig, load: str | None, tokenizer: str | None, folder: Path,
                    dtype: torch.dtype) -> None:
    """Fill `folder/hf`: from the loaded checkpoint's copies, else from the architecture and the tokenizer's folder.

    Args:
        model: architecture of the run.
        load: the `--load` folder, if any.
        tokenizer: the `--tokenizer-name-or-path` folder, if any.
        folder: the `--save` folder.
        dtype: of the saved weights.
    """
    target = folder / "hf"
    if target.exists():
        return
    with write_beside(target) as beside:
        beside.mkdir()
        fill_companions(model, load, tokenizer, beside, dtype)


def fill_companions(model: ModelConfig, load: str | None, tokenizer: str | None, folder: Path,
                    dtype: torch.dtype) -> None:
    """Put config.json and tokenizer files into an existing folder; arguments as above, `--load` may be a HF folder."""
    kept = (Path(load) if is_hf_folder(Path(load)) else Path(load) / "hf") if load else None
    if tokenizer and (kept is None or not any((kept / name).is_file() for name in VOCABULARIES)):
        copy_companions(Path(tokenizer), folder, None)
    if kept is not None and kept.is_dir():
        copy_companions(kept, folder, None)
    copied = read_json(folder / "config.json") if kept is not None and (kept / "config.json").is_file() else {}
    if copied.get("vocab_size") != model.vocab_size:  # none was kept, or rows were added
        config = copied | model.to_hf() | {"torch_dtype": dtype_name(dtype), "dtype": dtype_name(dtype)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
