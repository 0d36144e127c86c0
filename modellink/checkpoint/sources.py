"""Opens a folder of weights of either kind."""

from pathlib import Path

from modellink.checkpoint.folders import has_checkpoint
from modellink.checkpoint.hf import HFFolder, open_hf
from modellink.checkpoint.megatron import MegatronCheckpoint, open_megatron


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds a HF model and no Megatron checkpoint."""
    return not has_checkpoint(folder) and (Path(folder) / "config.json").is_file()


def holds_weights(folder: Path) -> bool:
    """Whether there is something to load: a finished checkpoint or a HF folder."""
    return has_checkpoint(folder) or is_hf_folder(folder)


def open_any(folder: Path) -> HFFolder | MegatronCheckpoint:
    """A HF folder, or the Megatron checkpoint that the folder's tracker names."""
    return open_hf(folder) if is_hf_folder(folder) else open_megatron(folder)
