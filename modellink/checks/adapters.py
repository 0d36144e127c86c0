"""LoRA flags and adapter checkpoints: which adapters a run trains, and whether it may start or continue this way."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from modellink.checkpoint.adapter_config import (
    ADAPTER_CONFIG,
    AdapterConfig,
    has_adapters,
    read_adapter_config,
    shape_of,
)
from modellink.checkpoint.folders import has_checkpoint
from modellink.checks.values import flag_name
from modellink.checks.weights import Weights
from modellink.config.errors import ConfigError, ProblemList
from modellink.config.model import ModelConfig
from modellink.config.settings import LoraSettings, Settings
from modellink.lora.plan import LoraPlan, make_plan
from modellink.parallel.dims import ParallelDims

if TYPE_CHECKING:
    from modellink.checkpoint.adapters import AdapterCheckpoint

# field of a plan -> the flag that says it
PLAN_FLAGS = {"kind": "--lora-target-modules", "targets": "--lora-target-modules", "rank": "--lora-r",
              "alpha": "--lora-alpha", "dropout": "--lora-dropout", "use_rslora": "--use-rslora",
              "use_dora": "--use-dora", "modules_to_save": "--lora-modules-to-save"}


def check_lora(settings: Settings, weights: Weights | None, model: ModelConfig, dims: ParallelDims | None,
               problems: ProblemList) -> LoraPlan | None:
    """The adapters a training run asks for, None when it trains all weights; adds every problem found."""
    _check_save_folder(settings, problems)
    if settings.lora.lora_target_modules is None:
        given = [flag_name(field.name) for field in fields(LoraSettings) if field.name in settings.given]
        if given:
            problems.add(f"{', '.join(given)} without --lora-target-modules: no adapters would be trained; add it, for "
                         f"example --lora-target-modules all-linear, or leave {'it' if len(given) == 1 else 'them'} "
                         "out.")
        return None
    plan = problems.catch(lambda: make_plan(settings.lora, model.tie_word_embeddings))
    if not isinstance(plan, LoraPlan):
        return None
    if settings.checkpoint.load is None and not settings.data.mock_data:
        problems.add("--lora-target-modules without --load: adapters are trained on the frozen weights of a base; give "
                     "its checkpoint folder.")
    save, load = settings.checkpoint.save, settings.lora.lora_load
    if save is not None and has_adapters(Path(save)):
        found = _check_adapters("--save", Path(save), plan, weights, model, problems)
        if found is not None and dims is not None:
            _check_continuation(save, found, dims, problems)
    elif load is not None:
        _check_adapters("--lora-load", Path(load), plan, weights, model, problems)
    return plan


def refuse_adapters_as_base(load: str) -> None:
    """Raise a ConfigError when `--load`, which names a base, names adapters."""
    if (Path(load) / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"--load {load}: holds LoRA adapters ({ADAPTER_CONFIG}), not whole weights; give their base, "
                          "and the adapters with --lora-load, or with --save to continue them.")


def _check_save_folder(settings: Settings, problems: ProblemList) -> None:
    save = settings.checkpoint.save
    if save is None:
        return
    adapters = (Path(save) / ADAPTER_CONFIG).is_file()
    if settings.lora.lora_target_modules is None and adapters:
        problems.add(f"--save {save}: holds LoRA adapters, but this run trains all weights; choose another folder or "
                     "add --lora-target-modules.")
    if settings.lora.lora_target_modules is not None and not adapters and has_checkpoint(Path(save)):
        problems.add(f"--save {save}: holds a checkpoint of whole weights, but this run saves LoRA adapters; choose "
                     "another folder.")


def _check_adapters(flag: str, folder: Path, plan: LoraPlan, weights: Weights | None, model: ModelConfig,
                    problems: ProblemList) -> "AdapterCheckpoint | None":
    """Adapters must be those that the flags describe, and belong to the base; None when something is wrong."""
    before = len(problems.problems)
    if not folder.is_dir() or not (folder / ADAPTER_CONFIG).is_file():
        from modellink.config.files import near_path_hint

        what = f"no {ADAPTER_CONFIG} in it" if folder.is_dir() else f"no such folder{near_path_hint(folder)}"
        problems.add(f"{flag} {folder}: {what}; give a folder that a LoRA run saved.")
        return None
    try:
        config = read_adapter_config(folder)
        _compare_plans(f"{flag} {folder}", config, plan, flag == "--save", problems)
        _compare_bases(f"{flag} {folder}", config, weights, model, problems)
        if len(problems.problems) > before:
            return None
        from modellink.checkpoint.adapters import AdapterCheckpoint  # imports torch

        return AdapterCheckpoint(folder)
    except ConfigError as error:
        for problem in error.problems:
            problems.add(f"{flag} {problem}")
        return None


def _compare_plans(place: str, config: AdapterConfig, plan: LoraPlan, with_dropout: bool,
                   problems: ProblemList) -> None:
    for name, flag in PLAN_FLAGS.items():
        have, want = getattr(config.plan, name), getattr(plan, name)
        if have == want or name == "kind" or (name == "dropout" and not with_dropout):
            continue
        have, want = (" ".join(value) or "nothing" if isinstance(value, tuple) else value for value in (have, want))
        problems.add(f"{place}: its adapters were made with {flag} {have}, but this run has {want}: use the same, or "
                     "start new adapters in another folder.")


def _compare_bases(place: str, config: AdapterConfig, weights: Weights | None, model: ModelConfig,
                   problems: ProblemList) -> None:
    shape = shape_of(model)
    other = [f"{name} {config.base_shape.get(name)} instead of {shape[name]}" for name in shape
             if config.base_shape.get(name) != shape[name]]
    if other:
        problems.add(f"{place}: its adapters belong to a base of another shape ({', '.join(other)}); give that base "
                     "with --load.")
    elif weights is not None and config.base_checksum:
        from modellink.checkpoint.adapter_config import base_checksum
        from modellink.checkpoint.sources import open_any  # imports torch

        found = problems.catch(lambda: base_checksum(open_any(Path(weights.folder))))
        if isinstance(found, str) and found != config.base_checksum:
            problems.add(f"{place}: its adapters belong to another base than --load {weights.folder} (checksum "
                         f"{config.base_checksum[:12]} instead of {found[:12]}); give the base they were trained on.")


def _check_continuation(save: str, found: "AdapterCheckpoint", dims: ParallelDims, problems: ProblemList) -> None:
    if not found.has_optimizer:
        problems.add(f"--save {save}: its adapters were saved without optimizer state and cannot be continued exactly; "
                     f"start from them with --lora-load {save} and another --save folder.")
    have = (found.layout.tensor, found.layout.pipeline, found.layout.chunks)
    if have != (dims.tensor, dims.pipeline, dims.chunks):
        problems.add(f"--save {save}: its adapters are of layout {found.layout}, but this run has TP{dims.tensor} "
                     f"PP{dims.pipeline}{f' VPP{dims.chunks}' if dims.chunks > 1 else ''}: use the same layout to "
                     f"continue, or start from them with --lora-load {save} and another --save folder.")
