"""The converter: HF folder to Megatron, Megatron to HF folder, one Megatron layout to another."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from modellink.checkpoint.checksums import Sums, check_files, file_sum, write_manifest
from modellink.checkpoint.chunks import Source
from modellink.checkpoint.convert_flags import (
    DTYPE_CHOICES,
    HF_FORMS,
    HF_LOADERS,
    SECTIONS,
    AdapterFlags,
    ConvertFlags,
    StatedFlags,
    TargetFlags,
)
from modellink.checkpoint.convert_merge import check_adapter_flags, reopen_merged, with_adapters
from modellink.checkpoint.convert_plan import (
    check_architecture,
    check_distributed_target,
    check_keep_optimizer,
    check_source_virtual,
    check_stated,
    same_folder,
    target_layout,
    target_names,
    unused_line,
)
from modellink.checkpoint.dist_job import DistJob
from modellink.checkpoint.folders import TRACKER, iteration_folder_name, rank_folder_name
from modellink.checkpoint.hf import (
    COMPANIONS,
    SHARD_BYTES,
    HFFolder,
    exported_config,
    hf_tensors,
    is_shard_name,
    open_hf,
    read_config,
    require_folder,
    shard_tensors,
    write_index,
    write_safetensors,
)
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.megatron import MegatronCheckpoint, open_megatron
from modellink.checkpoint.merged import MergedSource
from modellink.checkpoint.padding import cut_line
from modellink.checkpoint.plan_lines import checkpoint_plan, free_line, hf_plan
from modellink.checkpoint.publish import publish_folder, refuse_existing, require_space
from modellink.checkpoint.saved_args import DTYPES, saved_args
from modellink.checkpoint.verify import verify
from modellink.checkpoint.workers import write_parts
from modellink.checkpoint.writing import OPTIMIZER_FILE, CheckpointJob, total_bytes
from modellink.config.errors import ConfigError, ProblemList
from modellink.config.files import check_real
from modellink.config.model import ModelConfig
from modellink.config.parser import parse_sections
from modellink.data.recorded import copy_template

HF_COPIES = "hf"  # inside a Megatron folder: config and tokenizer of the HF folder it came from
EXPORT = "mg2hg"  # inside SAVE_DIR: the original's name for an exported HF folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command `tools/checkpoint/convert_ckpt.py`."""
    (what, target, adapters, stated, unused), given = parse_sections(
        "convert_ckpt.py", "Convert Qwen1.5 weights between HF folders and Megatron checkpoints of any layout.",
        SECTIONS, argv)
    to_hf = what.saver == "hf" or what.save_model_type in HF_FORMS
    line = unused_line(unused, given, to_hf)
    if line:
        print(line, flush=True)
    problems = ProblemList()
    for name in ("load_dir", "save_dir"):
        if not getattr(what, name):
            option = name.replace("_", "-")
            problems.add(f"--{option} is missing; give it as --{option} DIR.")
    if to_hf and what.loader in HF_LOADERS and adapters.lora_load is None:
        problems.add(f"--loader {what.loader} reads a HF folder and the target is a HF folder too; give --loader "
                     "megatron, or a Megatron target (--saver megatron --save-model-type megatron), or adapters to "
                     "merge (--lora-load).")
    if what.hf_config_dir and not to_hf:
        problems.add(f"--hf-config-dir {what.hf_config_dir} belongs to an export, but the target is a Megatron "
                     "checkpoint; leave it out.")
    if what.dry_run and (what.verify or what.verify_checksums):
        problems.add("--dry-run reads no tensor data, so leave out --verify and --verify-checksums.")
    if what.workers < 1:
        problems.add(f"--workers {what.workers}: must be 1 or more.")
    for name in ("target_tensor_parallel_size", "target_pipeline_parallel_size",
                 "num_layers_per_virtual_pipeline_stage", "make_vocab_size_divisible_by"):
        value = getattr(target, name)
        if value is not None and value < 1:
            problems.add(f"--{name.replace('_', '-')} {value}: must be 1 or more.")
    alone = check_adapter_flags(what, adapters, given, problems)
    problems.raise_if_any()
    shown = what.progress if "progress" in given else sys.stderr.isatty()
    if alone:
        from modellink.checkpoint.convert_adapters import convert_adapters  # shares the helpers below

        convert_adapters(what, target, adapters, given, shown)
    elif to_hf:
        export_hf(what, target, adapters, stated, given, shown)
    else:
        convert_to_megatron(what, target, adapters, stated, given, shown)
    return 0


def convert_to_megatron(what: ConvertFlags, target: TargetFlags, adapters: AdapterFlags, stated: StatedFlags,
                        given: frozenset[str], shown: bool) -> None:
    """HF folder or Megatron checkpoint to a Megatron checkpoint in the asked layout."""
    assert what.load_dir and what.save_dir
    source: HFFolder | MegatronCheckpoint
    load_dir, save_dir = Path(what.load_dir), Path(what.save_dir)
    if what.loader in HF_LOADERS:
        source = open_hf(load_dir, headers_only=what.dry_run)
        origin, companions = load_dir / "config.json", load_dir
    else:
        source = open_megatron(load_dir)
        origin, companions = source.rank_path(0, 0), load_dir / HF_COPIES
    problems = ProblemList()
    model = check_stated(stated, given, source, str(origin), problems)
    old = source.layout if isinstance(source, MegatronCheckpoint) else Layout()
    distributed = target.ckpt_format == "torch_dist"
    if distributed:
        problems.catch(lambda: check_distributed_target(target, what.workers))
    layout = Layout() if distributed else target_layout(target, old, source.model, problems)
    names = target_names(target, problems)
    dtype = DTYPES[DTYPE_CHOICES[target.params_dtype]] if target.params_dtype else None
    padded = model.padded_vocab_size(layout.tensor, target.make_vocab_size_divisible_by)
    if target.keep_optimizer and not distributed:
        problems.catch(lambda: check_keep_optimizer(source, layout, names, padded, dtype))
    problems.catch(lambda: same_folder(load_dir, save_dir))
    problems.catch(lambda: refuse_existing(save_dir, (TRACKER,), what.overwrite))
    tokenizer = Path(stated.tokenizer_model) if stated.tokenizer_model else None
    if tokenizer:
        problems.catch(lambda: check_real(tokenizer))
    problems.raise_if_any()

    base, iteration, form = {}, 1, "HF"
    if isinstance(source, MegatronCheckpoint):
        source.check()
        base, iteration, form = source.args, source.iteration or 1, source.form
        if source.has_optimizer and not target.keep_optimizer:
            print(f"{load_dir}: its optimizer state is left out; only weights are converted.", flush=True)
        if not what.dry_run:
            _say(cut_line(source, model.vocab_size,
                          stated=source.vocab_size_is_known or stated.true_vocab_size is not None))
    more = {"tokenizer_model": str(tokenizer)} if tokenizer else {}
    args = saved_args(model, layout, dtype=dtype or source.dtype, padded_vocab_size=padded, iteration=iteration,
                      make_vocab_size_divisible_by=target.make_vocab_size_divisible_by, base=base, names=names, **more)
    if isinstance(source, MegatronCheckpoint):
        _leave_unstated(args, source)
    weights = with_adapters(adapters, given, source, model, dtype, headers_only=what.dry_run)
    needed = total_bytes(weights, layout, model=model, padded_vocab_size=padded, dtype=dtype)
    print(f"{load_dir} ({form}, {source.dtype}) -> {save_dir} (Megatron "
          f"{'torch_dist' if distributed else layout}, {dtype or source.dtype}, "
          f"vocabulary {model.vocab_size} padded to {padded}), {needed / 1e9:.3g} GB", flush=True)

    def job_in(folder: Path) -> CheckpointJob | DistJob:
        if distributed:
            return DistJob(folder / iteration_folder_name(iteration), model, padded, dtype, args, iteration)
        return CheckpointJob(folder / iteration_folder_name(iteration), layout, model, padded, dtype, args, iteration,
                             names, target.keep_optimizer)

    if what.dry_run:
        planned = job_in(save_dir)
        lines = planned.plan(weights) if isinstance(planned, DistJob) else checkpoint_plan(planned, weights)
        print("\n".join([*lines, free_line(save_dir, needed)]), flush=True)
        return
    _check_source_files(what, source, shown)
    require_space(save_dir, needed)
    with publish_folder(save_dir, last=TRACKER) as folder:
        job = job_in(folder)
        job.folder.mkdir()
        sums: Sums = {}
        steps = (job.write(weights, sums) if isinstance(job, DistJob)
                 else write_parts(job, weights, _reopening(weights), what.workers, sums))
        show_progress(steps, needed, shown)
        if target.keep_optimizer:
            _copy_optimizer_files(source, job.folder, sums)
        write_manifest(job.folder, sums)
        copy_companions(companions, folder / HF_COPIES, tokenizer)
        if adapters.lora_load is not None:
            copy_template(Path(adapters.lora_load), folder / HF_COPIES)
        (folder / TRACKER).write_text(f"{iteration}\n", encoding="utf-8")
        if what.verify:
            verify(weights, open_megatron(folder), model, dtype, say=_say)


def export_hf(what: ConvertFlags, target: TargetFlags, adapters: AdapterFlags, stated: StatedFlags,
              given: frozenset[str], shown: bool) -> None:
    """Megatron checkpoint of any layout, or a HF folder with adapters to merge, to a HF folder."""
    assert what.load_dir and what.save_dir
    load_dir, save_dir = Path(what.load_dir), Path(what.save_dir)
    from_hf = what.loader in HF_LOADERS
    source = open_hf(load_dir, headers_only=what.dry_run) if from_hf else open_megatron(load_dir)
    origin = source.rank_path(0, 0) if isinstance(source, MegatronCheckpoint) else load_dir / "config.json"
    out = save_dir if what.saver == "hf" else save_dir / EXPORT
    problems = ProblemList()
    model = check_stated(stated, given, source, str(origin), problems)
    for name in ("tensor", "pipeline"):
        size = getattr(target, f"target_{name}_parallel_size")
        if size not in (None, 1):
            problems.add(f"--target-{name}-parallel-size {size}: a HF folder is not cut, so it must be 1; "
                         "the source's layout is read from disk.")
    problems.catch(lambda: check_source_virtual(target, source))
    problems.catch(lambda: same_folder(load_dir, out))
    problems.catch(lambda: refuse_existing(out, ("model.safetensors", "config.json"), what.overwrite))
    config_dir = problems.catch(lambda: find_config(what, load_dir, save_dir))
    problems.raise_if_any()
    assert isinstance(config_dir, Path)
    raw, config_model = read_config(config_dir)
    form = "HF"
    if isinstance(source, MegatronCheckpoint):
        model = check_architecture(config_model, model, source, str(config_dir / "config.json"))
        source.check()
        form = source.form
    dtype = DTYPES[DTYPE_CHOICES[target.params_dtype]] if target.params_dtype else None
    weights = with_adapters(adapters, given, source, model, dtype, headers_only=from_hf and what.dry_run)
    tensors = hf_tensors(weights, model, dtype)
    needed = sum(tensor.nbytes for tensor in tensors)
    print(f"{load_dir} ({form}, {source.dtype}) -> {out} (HF, {dtype or source.dtype}), "
          f"config and tokenizer from {config_dir}, {needed / 1e9:.3g} GB", flush=True)
    if what.dry_run:
        print("\n".join([*hf_plan(tensors, SHARD_BYTES), free_line(out, needed)]), flush=True)
        return
    if isinstance(source, MegatronCheckpoint):
        known = source.vocab_size_is_known or stated.true_vocab_size is not None
        _say(cut_line(source, model.vocab_size, stated=known))
    _check_source_files(what, source, shown)
    require_space(out, needed)
    stale = [path for path in out.iterdir() if is_shard_name(path.name)] if out.is_dir() else []
    with publish_folder(out, stale=stale, last="config.json") as folder:
        sums: Sums = {}
        shards = shard_tensors(tensors, SHARD_BYTES)
        job = HFJob(folder, model, dtype, len(shards))
        show_progress(write_parts(job, weights, _reopening(weights), what.workers, sums), needed, shown)
        write_index(folder, shards)
        copy_companions(config_dir, folder, None)
        if adapters.lora_load is not None:
            copy_template(Path(adapters.lora_load), folder)
        text = json.dumps(exported_config(raw, model, dtype or source.dtype), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        sums.update({path.name: file_sum(path) for path in folder.iterdir() if path.name not in sums})
        write_manifest(folder, sums)
        if what.verify:
            verify(weights, open_hf(folder), model, dtype, say=_say)


@dataclass(frozen=True)
class HFJob:
    """The safetensors files of a HF folder; it travels to worker processes."""

    folder: Path
    model: ModelConfig
    dtype: torch.dtype | None
    num_shards: int

    @property
    def parts(self) -> list[int]:
        """The numbers of the shards."""
        return list(range(self.num_shards))

    def write(self, source: Source, parts: Sequence[int], sums: Sums) -> Iterator[int]:
        shards = list(shard_tensors(hf_tensors(source, self.model, self.dtype), SHARD_BYTES).items())
        for part in parts:
            name, tensors = shards[part]
            yield from write_safetensors(self.folder / name, tensors, sums)


def _say(line: str) -> None:
    if line:
        print(line, flush=True)


def _reopening(source: HFFolder | MegatronCheckpoint | MergedSource) -> Callable[[], Source]:
    """How a worker process opens the same source."""
    if isinstance(source, MergedSource):
        assert source.opened_from is not None and isinstance(source.base, (HFFolder, MegatronCheckpoint))
        return partial(reopen_merged, _reopening(source.base), source.opened_from, source.adapters.model,
                       source.adapters.config.plan.alpha, source.asked)
    if isinstance(source, HFFolder):
        return partial(HFFolder, source.folder)
    return partial(type(source), source.folder)


def _leave_unstated(args: argparse.Namespace, source: MegatronCheckpoint) -> None:
    """What the source does not say the target must not claim to know."""
    for field, name in (("rope_theta", "rotary_base"), ("rms_norm_eps", "norm_epsilon")):
        if field in source.unstated:
            setattr(args, name, None)
    if not source.vocab_size_is_known and args.vocab_size == source.padded_vocab_size:
        args.vocab_size = None


def _check_source_files(what: ConvertFlags, source: HFFolder | MegatronCheckpoint, shown: bool) -> None:
    """`--verify-checksums`."""
    if not what.verify_checksums:
        return
    rank_files = source.rank_paths() if isinstance(source, MegatronCheckpoint) else []
    with tqdm(unit="B", unit_scale=True, desc="checksums", disable=not shown) as bar:
        _say(check_files(source.folder, rank_files, bar.update))


def _copy_optimizer_files(source: HFFolder | MegatronCheckpoint, folder: Path, sums: Sums) -> None:
    """The distributed optimizer's own files."""
    assert isinstance(source, MegatronCheckpoint)
    for stage in range(source.layout.pipeline):
        for rank in range(source.layout.tensor):
            path = source.rank_path(rank, stage).with_name(OPTIMIZER_FILE)
            if path.is_file():
                copy = folder / rank_folder_name(source.layout, rank, stage) / OPTIMIZER_FILE
                shutil.copyfile(path, copy)
                sums[str(copy.relative_to(folder))] = file_sum(copy)


def find_config(what: ConvertFlags, load_dir: Path, save_dir: Path) -> Path:
    """The folder whose config and tokenizer an export takes."""
    if what.hf_config_dir:
        return require_folder(Path(what.hf_config_dir))
    own = load_dir if what.loader in HF_LOADERS else load_dir / HF_COPIES
    candidates = [own] if what.saver == "hf" else [save_dir, own]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(f"no config.json in {' or '.join(str(folder) for folder in candidates)}, and an export takes "
                      "config and tokenizer from there; give --hf-config-dir with the HF folder of the model.")


def copy_companions(source: Path, target: Path, tokenizer: Path | None) -> None:
    """Copy config, generation config and tokenizer files, as far as they are there."""
    files = [source / name for name in COMPANIONS if (source / name).is_file()]
    if tokenizer and tokenizer.name not in {path.name for path in files}:
        files.append(tokenizer)
    if files:
        target.mkdir(exist_ok=True)
    for path in files:
        shutil.copyfile(path, target / path.name)


def show_progress(steps: Iterable[int], total: int, shown: bool) -> None:
    """Run the steps under a bar with bytes, rate and time left; each step is the number of bytes it wrote."""
    start = time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not shown) as bar:
        for step in steps:
            bar.update(step)
    seconds = time.perf_counter() - start
    print(f"wrote {total / 1e9:.3g} GB in {seconds:.2f} s", flush=True)
