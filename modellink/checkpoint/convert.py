"""The converter: HF folder to Megatron, Megatron to HF folder, one Megatron layout to another."""

import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from modellink.checkpoint.convert_flags import (
    DTYPE_CHOICES,
    HF_FORMS,
    HF_LOADERS,
    SECTIONS,
    ConvertFlags,
    StatedFlags,
    TargetFlags,
)
from modellink.checkpoint.convert_plan import (
    check_architecture,
    check_source_virtual,
    check_stated,
    same_folder,
    target_layout,
    unused_line,
)
from modellink.checkpoint.folders import TRACKER, iteration_folder_name
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
    write_weights,
)
from modellink.checkpoint.megatron import MegatronCheckpoint, open_megatron
from modellink.checkpoint.publish import publish_folder, refuse_existing, require_space
from modellink.checkpoint.saved_args import DTYPES, saved_args
from modellink.checkpoint.writing import total_bytes, write_checkpoint
from modellink.config.errors import ConfigError, ProblemList
from modellink.config.files import check_real
from modellink.config.parser import parse_sections

HF_COPIES = "hf"  # inside a Megatron folder: config and tokenizer of the HF folder it came from
EXPORT = "mg2hg"  # inside SAVE_DIR: the original's name for an exported HF folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command `tools/checkpoint/convert_ckpt.py`."""
    (what, target, stated, unused), given = parse_sections(
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
    if to_hf and what.loader in HF_LOADERS:
        problems.add(f"--loader {what.loader} reads a HF folder and the target is a HF folder too; "
                     "give --loader megatron, or a Megatron target (--saver megatron --save-model-type megatron).")
    if what.hf_config_dir and not to_hf:
        problems.add(f"--hf-config-dir {what.hf_config_dir} belongs to an export, but the target is a Megatron "
                     "checkpoint; leave it out.")
    for name in ("target_tensor_parallel_size", "target_pipeline_parallel_size",
                 "num_layers_per_virtual_pipeline_stage", "make_vocab_size_divisible_by"):
        value = getattr(target, name)
        if value is not None and value < 1:
            problems.add(f"--{name.replace('_', '-')} {value}: must be 1 or more.")
    problems.raise_if_any()
    if to_hf:
        export_hf(what, target, stated, given)
    else:
        convert_to_megatron(what, target, stated, given)
    return 0


def convert_to_megatron(what: ConvertFlags, target: TargetFlags, stated: StatedFlags, given: frozenset[str]) -> None:
    """HF folder or Megatron checkpoint to a Megatron checkpoint in the asked layout."""
    assert what.load_dir and what.save_dir
    source: HFFolder | MegatronCheckpoint
    load_dir, save_dir = Path(what.load_dir), Path(what.save_dir)
    if what.loader in HF_LOADERS:
        source, origin, companions = open_hf(load_dir), load_dir / "config.json", load_dir
    else:
        source = open_megatron(load_dir)
        origin, companions = source.rank_path(0, 0), load_dir / HF_COPIES
    problems = ProblemList()
    model = check_stated(stated, given, source, str(origin), problems)
    layout = target_layout(target, source, problems)
    problems.catch(lambda: same_folder(load_dir, save_dir))
    problems.catch(lambda: refuse_existing(save_dir, (TRACKER,), what.overwrite))
    tokenizer = Path(stated.tokenizer_model) if stated.tokenizer_model else None
    if tokenizer:
        problems.catch(lambda: check_real(tokenizer))
    problems.raise_if_any()

    dtype = DTYPES[DTYPE_CHOICES[target.params_dtype]] if target.params_dtype else None
    padded = model.padded_vocab_size(layout.tensor, target.make_vocab_size_divisible_by)
    base, iteration, form = {}, 1, "HF"
    if isinstance(source, MegatronCheckpoint):
        source.check()
        base, iteration, form = source.args, source.iteration or 1, f"Megatron {source.layout}"
        if source.has_optimizer:
            print(f"{load_dir}: its optimizer state is left out; only weights are converted.", flush=True)
    more = {"tokenizer_model": str(tokenizer)} if tokenizer else {}
    args = saved_args(model, layout, dtype=dtype or source.dtype, padded_vocab_size=padded, iteration=iteration,
                      make_vocab_size_divisible_by=target.make_vocab_size_divisible_by, base=base, **more)
    needed = total_bytes(source, layout, model=model, padded_vocab_size=padded, dtype=dtype)
    require_space(save_dir, needed)
    print(f"{load_dir} ({form}, {source.dtype}) -> {save_dir} (Megatron {layout}, {dtype or source.dtype}, "
          f"vocabulary {model.vocab_size} padded to {padded}), {needed / 1e9:.3g} GB", flush=True)
    name = iteration_folder_name(iteration)
    with publish_folder(save_dir, last=TRACKER) as folder:
        steps = write_checkpoint(folder / name, source, layout, model=model, padded_vocab_size=padded, dtype=dtype,
                                 args=args, iteration=iteration)
        show_progress(steps, needed, what.progress if "progress" in given else sys.stderr.isatty())
        copy_companions(companions, folder / HF_COPIES, tokenizer)
        (folder / TRACKER).write_text(f"{iteration}\n", encoding="utf-8")


def export_hf(what: ConvertFlags, target: TargetFlags, stated: StatedFlags, given: frozenset[str],
              shard_bytes: int = SHARD_BYTES) -> None:
    """Megatron checkpoint of any layout to a HF folder."""
    assert what.load_dir and what.save_dir
    load_dir, save_dir = Path(what.load_dir), Path(what.save_dir)
    source = open_megatron(load_dir)
    out = save_dir if what.saver == "hf" else save_dir / EXPORT
    problems = ProblemList()
    stated_model = check_stated(stated, given, source, str(source.rank_path(0, 0)), problems)
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
    model = check_architecture(config_model, stated_model, source, str(config_dir / "config.json"))
    source.check()
    dtype = DTYPES[DTYPE_CHOICES[target.params_dtype]] if target.params_dtype else None
    tensors = hf_tensors(source, model, dtype)
    needed = sum(tensor.nbytes for tensor in tensors)
    require_space(out, needed)
    print(f"{load_dir} (Megatron {source.layout}, {source.dtype}) -> {out} (HF, {dtype or source.dtype}), "
          f"config and tokenizer from {config_dir}, {needed / 1e9:.3g} GB", flush=True)
    stale = [path for path in out.iterdir() if is_shard_name(path.name)] if out.is_dir() else []
    with publish_folder(out, stale=stale, last="config.json") as folder:
        show_progress(write_weights(folder, tensors, shard_bytes), needed,
                      what.progress if "progress" in given else sys.stderr.isatty())
        copy_companions(config_dir, folder, None)
        text = json.dumps(exported_config(raw, model, dtype or source.dtype), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def find_config(what: ConvertFlags, load_dir: Path, save_dir: Path) -> Path:
    """The folder whose config and tokenizer an export takes."""
    if what.hf_config_dir:
        return require_folder(Path(what.hf_config_dir))
    candidates = [load_dir / HF_COPIES] if what.saver == "hf" else [save_dir, load_dir / HF_COPIES]
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
