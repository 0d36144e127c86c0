"""Keeps config.json and tokenizer files inside a checkpoint, so that it can be exported without anything else."""

import json
from pathlib import Path

import torch

from modellink.checkpoint.convert import copy_companions
from modellink.checkpoint.saved_args import dtype_name
from modellink.config.files import read_json, write_beside
from modellink.config.model import ModelConfig


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
    kept = Path(load) / "hf" if load else None
    with write_beside(target) as beside:
        beside.mkdir()
        source = kept if kept is not None and kept.is_dir() else Path(tokenizer) if tokenizer else None
        if source is not None:
            copy_companions(source, beside, None)
        copied = read_json(beside / "config.json") if (beside / "config.json").is_file() else {}
        if source is not kept or copied.get("vocab_size") != model.vocab_size:
            base = copied if source is kept else {}
            config = base | model.to_hf() | {"torch_dtype": dtype_name(dtype), "dtype": dtype_name(dtype)}
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
