"""Compares a Megatron checkpoint in our model with a Hugging Face folder in transformers: the logits of real text.

`python -m modellink.quickstart.compare --load CHECKPOINT --hf-folder FOLDER --text FILE.jsonl`
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.config.errors import ConfigError, run_command
from modellink.config.fields import flag
from modellink.config.files import check_real
from modellink.config.parser import parse_sections

if TYPE_CHECKING:
    from torch import Tensor

    from modellink.inference.engine import Engine


@dataclass(frozen=True)
class CompareFlags:
    """What to compare."""

    load: str | None = flag(None, "Megatron checkpoint of any layout", metavar="DIR")
    hf_folder: str | None = flag(None, "Hugging Face folder with weights and tokenizer", metavar="DIR")
    text: str | None = flag(None, "JSON lines with the key text; the first document is read", metavar="FILE")
    tokens: int = flag(256, "tokens of the document to compare")
    tolerance: float = flag(1e-5, "largest difference that passes, as a share of the largest logit")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the largest difference; exit code 1 when it is above the tolerance."""
    (flags,), _ = parse_sections("compare.py", "Compare our model's logits with transformers'.", (CompareFlags,), argv)
    for name in ("load", "hf_folder", "text"):
        if getattr(flags, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')} is missing: give what is to be compared.")
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    warnings.filterwarnings("ignore")
    ids = first_tokens(Path(flags.text), flags.hf_folder, flags.tokens)
    ours, theirs = our_logits(flags.load, flags.hf_folder, ids), their_logits(flags.hf_folder, ids)
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"{ours.shape[1]} tokens x {ours.shape[2]} logits, up to {largest:.1f} in size: ours and transformers' "
          f"differ by {difference:.1e} at most ({difference / largest:.1e} of the largest)")
    if not difference <= flags.tolerance * largest:  # also true for nan
        print(f"that is more than {flags.tolerance:g} of the largest: {flags.load} and {flags.hf_folder} do not hold "
              "the same model", file=sys.stderr)
        return 1
    return 0


def first_tokens(path: Path, tokenizer_folder: str, count: int) -> "Tensor":
    """The first `count` tokens of the first document, [1, tokens] int64."""
    import torch

    from modellink.data.tokenizer import load_tokenizer

    with open(check_real(path), encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"]
    return torch.tensor([load_tokenizer(tokenizer_folder).encode(text)[:count]])


def our_engine(load: str, tokenizer_folder: str, seq_length: int) -> "Engine":
    """A Megatron checkpoint in one process on the CPU; the caller stops the process groups."""
    from modellink.config.settings import parse_settings
    from modellink.runtime import TITLES, prepare_run

    settings = parse_settings("compare.py", TITLES["generate"], [
        "--load", load, "--tokenizer-name-or-path", tokenizer_folder, "--device", "cpu", "--seq-length",
        str(seq_length)])
    run = prepare_run(settings, 1, "generate")
    from modellink.start import start

    device = start(run)
    from modellink.inference.load import load_engine  # imports megatron.core, which is prepared by now

    return load_engine(run, device)


def our_logits(load: str, tokenizer_folder: str, ids: "Tensor") -> "Tensor":
    """Logits of a Megatron checkpoint in one process on the CPU, [1, tokens, vocabulary] fp32."""
    engine = our_engine(load, tokenizer_folder, ids.shape[1])
    from modellink.inference.cache import Piece

    tokens = ids[0].tolist()
    hidden = engine.replica.run(engine.replica.reserve(1, len(tokens)), [Piece(0, 0, tokens)], [*range(len(tokens))])
    assert hidden is not None
    logits = engine.replica.logits(hidden)[None]
    from modellink.parallel.groups import stop_groups

    stop_groups()
    return logits


def their_logits(folder: str, ids: "Tensor") -> "Tensor":
    """Logits of transformers' own class, [1, tokens, vocabulary] fp32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits.float()
    return logits


if __name__ == "__main__":
    sys.exit(run_command(main))
