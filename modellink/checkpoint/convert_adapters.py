"""Converts adapters alone: adapter checkpoints of any layout, the original's, and PEFT folders, into one another."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from modellink.checkpoint.adapter_config import (
    ADAPTER_CONFIG,
    AdapterConfig,
    base_checksum,
    read_adapter_config,
    shape_of,
)
from modellink.checkpoint.adapter_folders import adapter_form, check_base, open_adapters
from modellink.checkpoint.adapter_rules import adapter_chunk_rules
from modellink.checkpoint.adapters import Adapters, RankAdapters
from modellink.checkpoint.checksums import Sums, check_files, file_sum, write_manifest
from modellink.checkpoint.chunks import LazyTensor, Source, rule_tensors
from modellink.checkpoint.convert import show_progress
from modellink.checkpoint.convert_flags import DTYPE_CHOICES, PEFT, AdapterFlags, ConvertFlags, TargetFlags
from modellink.checkpoint.convert_merge import open_stated
from modellink.checkpoint.convert_plan import same_folder, target_layout
from modellink.checkpoint.folders import TRACKER, iteration_folder_name
from modellink.checkpoint.hf import write_safetensors
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.peft_folder import BASE_CHECKSUM, PICKLED, WEIGHTS
from modellink.checkpoint.plan_lines import checkpoint_plan, free_line, shape_table
from modellink.checkpoint.publish import publish_folder, refuse_existing, require_space
from modellink.checkpoint.saved_args import DTYPES, saved_args
from modellink.checkpoint.sources import is_hf_folder, open_any
from modellink.checkpoint.verify import compare_lists
from modellink.checkpoint.workers import write_parts
from modellink.checkpoint.writing import CheckpointJob
from modellink.config.errors import ConfigError, ProblemList
from modellink.config.model import ModelConfig
from modellink.data.recorded import copy_template
from modellink.lora.peft import peft_config
from modellink.lora.plan import LoraPlan


def convert_adapters(what: ConvertFlags, target: TargetFlags, flags: AdapterFlags, given: frozenset[str],
                     shown: bool) -> None:
    """Adapters of any form and layout to an adapter checkpoint in the asked layout, or to a PEFT folder."""
    assert what.load_dir and what.save_dir
    load_dir, save_dir = Path(what.load_dir), Path(what.save_dir)
    base = _open_base(flags)
    model = base.model if base is not None else _described_base(load_dir)
    adapters = open_stated("--load-dir", load_dir, flags, given, model)
    to_peft = what.saver == PEFT
    problems = ProblemList()
    if base is not None:
        problems.catch(lambda: check_base(f"--load-dir {load_dir}", adapters, model, lambda: base,
                                          f"--base-dir {flags.base_dir}"))
    old = adapters.layout if isinstance(adapters, RankAdapters) else Layout()
    layout = Layout() if to_peft else target_layout(target, old, model, problems)
    problems.catch(lambda: same_folder(load_dir, save_dir))
    problems.catch(lambda: refuse_existing(save_dir, (TRACKER, ADAPTER_CONFIG), what.overwrite))
    problems.raise_if_any()
    adapters.check()
    dtype = DTYPES[DTYPE_CHOICES[target.params_dtype]] if target.params_dtype else None
    checksum = adapters.config.base_checksum or (base_checksum(base) if base is not None and not what.dry_run else "")
    config = AdapterConfig(adapters.config.plan, shape_of(model), checksum)
    tensors = adapters.peft_tensors(dtype)
    job = _job(target, layout, adapters, model, dtype)
    needed = sum(tensor.nbytes for tensor in tensors) if to_peft else job.nbytes(adapters)
    form = f"adapters {adapters.layout}" if isinstance(adapters, RankAdapters) else "PEFT"
    print(f"{load_dir} ({form}, {adapters.dtype}) -> {save_dir} ({'PEFT' if to_peft else f'adapters {layout}'}, "
          f"{dtype or adapters.dtype}), {needed / 1e6:.3g} MB", flush=True)
    if what.dry_run:
        lines = shape_table((tensor.name, tensor) for tensor in tensors) if to_peft else checkpoint_plan(job, adapters)
        print("\n".join([*lines, free_line(save_dir, needed)]), flush=True)
        return
    if what.verify_checksums:
        print(check_files(adapters.folder, adapters.rank_paths() if isinstance(adapters, RankAdapters) else []),
              flush=True)
    require_space(save_dir, needed)
    stale = [save_dir / name for name in ((TRACKER,) if to_peft else (WEIGHTS, PICKLED))]
    with publish_folder(save_dir, stale=stale, last=ADAPTER_CONFIG if to_peft else TRACKER) as folder:
        sums: Sums = {}
        copy_template(load_dir, folder)
        if to_peft:
            show_progress(write_safetensors(folder / WEIGHTS, tensors, sums, **{BASE_CHECKSUM: checksum}), needed,
                          shown)
            hf_base = flags.base_dir if flags.base_dir and is_hf_folder(Path(flags.base_dir)) else None
            content = peft_config(config.plan, hf_base, model.tie_word_embeddings)
            (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            sums.update({path.name: file_sum(path) for path in folder.iterdir() if path.name not in sums})
            write_manifest(folder, sums)
        else:
            job = replace(job, folder=folder / iteration_folder_name(job.iteration))
            job.folder.mkdir()
            reopen = partial(open_adapters, load_dir, model, config.plan.alpha)
            show_progress(write_parts(job, adapters, reopen, what.workers, sums), needed, shown)
            write_manifest(job.folder, sums)
            config.write(folder)
            (folder / TRACKER).write_text(f"{job.iteration}\n", encoding="utf-8")
        if what.verify:
            _verify(adapters, open_adapters(folder, model), dtype, partial(print, flush=True))


def _open_base(flags: AdapterFlags) -> Source | None:
    if flags.base_dir is None:
        return None
    try:
        return open_any(Path(flags.base_dir))
    except ConfigError as error:
        raise ConfigError([f"--base-dir {problem}" for problem in error.problems]) from error


def _described_base(folder: Path) -> ModelConfig:
    """The architecture below adapters that say it themselves."""
    try:
        form = adapter_form(folder)
    except ConfigError as error:
        raise ConfigError([f"--load-dir {problem}" for problem in error.problems]) from error
    if form != "own":
        raise ConfigError(f"--base-dir is missing: {folder} does not describe the model below its adapters; give it, "
                          "in either form.")
    return ModelConfig(**read_adapter_config(folder).base_shape)


@dataclass(frozen=True)
class AdapterJob(CheckpointJob):
    """The rank files of an adapter checkpoint."""

    plan: LoraPlan = field(kw_only=True)

    def states(self, source: Source, stage: int) -> list[dict[str, dict[str, LazyTensor]]]:
        def chunk_of(rank: int, chunk: int) -> dict[str, LazyTensor]:
            rules = adapter_chunk_rules(self.plan, self.model, self.layout, stage, chunk)
            tensors = rule_tensors(source, rules, self.layout, rank, self.padded_vocab_size, self.dtype)
            return {tensor.name: tensor for tensor in tensors}

        keys = [f"model{chunk}" for chunk in range(self.layout.chunks)] if self.layout.chunks > 1 else ["model"]
        return [{key: chunk_of(rank, chunk) for chunk, key in enumerate(keys)} for rank in range(self.layout.tensor)]

    def nbytes(self, source: Source) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for stage in range(self.layout.pipeline) for state in self.states(source, stage)
                   for chunk in state.values() for tensor in chunk.values())


def _job(target: TargetFlags, layout: Layout, adapters: Adapters, model: ModelConfig,
         dtype: torch.dtype | None) -> AdapterJob:
    """What an adapter checkpoint in `layout` holds; its folder is not known yet."""
    padded = model.padded_vocab_size(layout.tensor, target.make_vocab_size_divisible_by)
    iteration = adapters.iteration or 1
    args = saved_args(model, layout, dtype=dtype or adapters.dtype, padded_vocab_size=padded, iteration=iteration,
                      make_vocab_size_divisible_by=target.make_vocab_size_divisible_by)
    return AdapterJob(Path(), layout, model, padded, dtype, args, iteration, plan=adapters.config.plan)


def _verify(source: Adapters, result: Adapters, dtype: torch.dtype | None, say: Callable[[str], object]) -> None:
    """Every tensor bit by bit, and what scales them."""
    # the order follows the kind, and a PEFT folder has no fused one
    stored, wanted, found = (sorted(tensors, key=lambda tensor: tensor.name) for tensors in (
        source.peft_tensors(), source.peft_tensors(dtype), result.peft_tensors()))
    compare_lists(stored, wanted, found, dtype, say)
    old, new = source.config.plan, result.config.plan
    for name in ("rank", "scaling", "use_dora", "modules_to_save"):
        if getattr(old, name) != getattr(new, name):
            raise ConfigError(f"--verify: {name} of the adapters is {getattr(old, name)} in the source, but "
                              f"{getattr(new, name)} in the result; do not use the result.")
    say(f"rank {new.rank}, scale {new.scaling:g}{', DoRA' * new.use_dora}, on {' '.join(new.targets)}")
