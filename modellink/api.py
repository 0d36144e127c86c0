"""`modellink.load`: a model for Python, and the way from settings to a model that every program of ours takes."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.config.errors import ConfigError
from modellink.config.settings import Settings, parse_settings
from modellink.models.run import Run
from modellink.parallel.rank import Rank
from modellink.runtime import TITLES, prepare_run

if TYPE_CHECKING:
    from modellink.inference.frontend import Frontend
    from modellink.inference.model import Model

PRECISIONS = {"fp32": "--fp32", "float32": "--fp32", "bf16": "--bf16", "bfloat16": "--bf16", "fp16": "--fp16",
              "float16": "--fp16"}


def load(path: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None,
         lora: str | os.PathLike[str] | None = None, dtype: Any = None, tp: int = 1, pp: int = 1, device: str = "auto",
         **flags: Any) -> "Model":
    """Load a model to generate with.

    Args:
        path: a Megatron checkpoint of any layout, or a Hugging Face folder.
        tokenizer: folder of the tokenizer (default: the one kept with the weights).
        lora: an adapter checkpoint, laid over the weights.
        dtype: fp32, bf16 or fp16, or a torch dtype (default: that of the weights).
        tp, pp: tensor and pipeline parallel ranks; more than one in a script that `modellink launch` or torchrun starts
            on tp x pp ranks, each of which calls this.
        device: auto, npu, cuda or cpu.
        flags: any other flag of inference.py by its name with underscores, for example seq_length=2048.

    Raises:
        ConfigError: every problem that can be found before the weights are read, one sentence each.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    words = ["--load", os.fspath(path), "--tokenizer-name-or-path", os.fspath(tokenizer or _kept_tokenizer(Path(path))),
             "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp), "--device", device]
    if lora is not None:
        words += ["--lora-load", os.fspath(lora)]
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in PRECISIONS:
            raise ConfigError(f"dtype {name}: must be one of fp32, bf16, fp16; choose one.")
        words.append(PRECISIONS[name])
    return open_model(parse_settings("modellink.load", TITLES["generate"], words + _words(flags)))


def _kept_tokenizer(path: Path) -> Path:
    """The folder of the tokenizer files that lie with the weights."""
    from modellink.data.tokenizer import VOCABULARIES

    for folder in (path, path / "hf"):
        if any(all((folder / name).is_file() for name in row) for row in VOCABULARIES):
            return folder
    if not path.is_dir():
        return path  # the sentence about the weights says it
    raise ConfigError(f"{path}: no tokenizer lies with the weights; name its folder with tokenizer=.")


def _words(flags: dict[str, Any]) -> list[str]:
    """Keywords as a command line."""
    words: list[str] = []
    for name, value in flags.items():
        option = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, (list, tuple)):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", str(value)]
    return words


def check_generation(settings: Settings) -> Run:
    """The checked run of a command line that generates, on as many ranks as the environment says.

    Raises:
        ConfigError: every problem found.
    """
    return prepare_run(settings, Rank.from_environment().world_size, "generate")


def open_model(settings: Settings, run: Run | None = None, frontend: "Frontend | None" = None) -> "Model":
    """Check, load tokenizer and defaults, start the device and this rank's groups, and read the weights.

    Args:
        run, frontend: what the caller has made of the settings already.
    """
    from modellink.inference.frontend import Frontend

    run = run or check_generation(settings)
    frontend = frontend or Frontend.of(settings)
    from modellink.start import start

    device = start(run)
    from modellink.inference.load import load_engine  # imports megatron.core, which is prepared by now
    from modellink.inference.model import Model

    return Model(load_engine(run, device), frontend)
