"""What a run carries from step to step, and its way to disk and back, in both forms that Megatron-LM reads."""

import os
import random
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from modellink.checkpoint.adapter_config import AdapterConfig, shape_of
from modellink.checkpoint.checksums import MANIFEST, Sums, file_sum, write_manifest
from modellink.checkpoint.companions import keep_companions
from modellink.checkpoint.distributed import DistCheckpoint
from modellink.checkpoint.folders import (
    find_checkpoint,
    is_distributed,
    iteration_folder_name,
    rank_folder_name,
    write_tracker,
)
from modellink.checkpoint.hf import HFFolder
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.load_model import load_model
from modellink.checkpoint.rank_file import load_rank_file, save_rank_file
from modellink.checkpoint.saved_args import saved_args
from modellink.checkpoint.sources import open_any
from modellink.config import ConfigError
from modellink.config.files import disk_error, remove
from modellink.data.recorded import keep_template
from modellink.device.base import Device
from modellink.lora.state import trainable_state
from modellink.models.run import Run
from modellink.ops.forms import DTYPES
from modellink.parallel.rank import Rank
from modellink.training.dist_state import RATES, read_distributed, read_rng, write_distributed
from modellink.training.optimizer import complete_parameters
from modellink.training.vocabulary import fill_new_rows

MODEL_FILE, OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    flops: float = 0.0


@dataclass
class TrainState:
    """Everything a checkpoint holds."""

    run: Run
    device: Device
    chunks: list[Any]  # wrapped in DistributedDataParallel
    optimizer: Any
    schedule: Any
    progress: Progress = field(default_factory=Progress)
    base_checksum: str = ""  # of the frozen weights below adapters

    @property
    def layout(self) -> Layout:
        dims = self.run.dims
        return Layout(dims.tensor, dims.pipeline, dims.chunks, dims.stage_layers)

    @property
    def rank_folder(self) -> str:
        return rank_folder_name(self.layout, parallel_state.get_tensor_model_parallel_rank(),
                                parallel_state.get_pipeline_model_parallel_rank())


def _model_keys(chunks: list[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _model_state(run: Run, chunk: Any) -> dict[str, torch.Tensor]:
    if run.lora is not None:
        return trainable_state(chunk.module)
    # local-spec names without the wrapper's prefix; the core's empty extra states carry nothing
    return {name: parameter.detach() for name, parameter in chunk.module.named_parameters()}


def _rng_state(device: Device) -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": device.rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(device: Device, state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    device.set_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def save(state: TrainState, folder: Path) -> None:
    """Write a checkpoint in the form of `--ckpt-format`; the tracker names it only after every rank has finished.

    Every rank takes part.
    """
    settings = state.run.settings
    step_folder = folder / iteration_folder_name(state.progress.step)
    with complete_parameters(state.chunks):
        if settings.checkpoint.ckpt_format == "torch_dist":
            rng = _rng_state(state.device) if settings.checkpoint.save_rng else None
            write_distributed(state, step_folder, _common_state(state), rng)
        else:
            _save_ranks(state, step_folder)
    dist.barrier()
    if Rank.from_environment().local_rank == 0:  # on every node: its disk may be its own
        if state.run.lora is not None:
            AdapterConfig(state.run.lora, shape_of(state.run.model), state.base_checksum).write(folder)
        else:
            keep_companions(state.run.model, settings.checkpoint.load, settings.data.tokenizer_name_or_path, folder,
                            DTYPES[settings.train.precision])
        if settings.data_kind != "text":
            keep_template(settings.data, folder if state.run.lora is not None else folder / "hf")
        write_tracker(folder, state.progress.step)
    dist.barrier()


def _save_ranks(state: TrainState, step_folder: Path) -> None:
    """The per-rank form.

    Weights are written by data parallel rank 0 of each model part; the distributed optimizer first gathers its shards
    there. The manifest of a node names the files on its disk.
    """
    settings = state.run.settings
    sums: Sums = {}
    rank_folder = step_folder / state.rank_folder
    writes = parallel_state.get_data_parallel_rank() == 0
    with_optimizer = settings.checkpoint.save_optim
    sharded = settings.parallel.use_distributed_optimizer
    if Rank.from_environment().local_rank == 0:
        remove(step_folder / MANIFEST)  # of a former run
        if is_distributed(step_folder):
            remove(step_folder)
    dist.barrier()
    try:
        if writes:
            rank_folder.mkdir(parents=True, exist_ok=True)
            sums[f"{rank_folder.name}/{MODEL_FILE}"] = save_rank_file(rank_folder / MODEL_FILE, _rank_state(state))
        if with_optimizer and sharded:
            # gathers over the data parallel group, then rank 0 of it writes
            beside = rank_folder / f".{OPTIMIZER_FILE}.part"
            for parameter in (p for group in state.optimizer.optimizer.param_groups for p in group["params"]):
                state.optimizer.optimizer.moments(parameter)  # the core gathers them also before the first step
            state.optimizer.save_parameter_state(str(beside))
            if writes:
                sums[f"{rank_folder.name}/{OPTIMIZER_FILE}"] = file_sum(beside)
                os.replace(beside, rank_folder / OPTIMIZER_FILE)
    except (ConfigError, OSError, RuntimeError) as error:
        remove(rank_folder)
        with suppress(OSError):  # other ranks' files are there
            step_folder.rmdir()
        # torch's own writer reports a failed write of the optimizer file as a RuntimeError
        if isinstance(error, ConfigError) or not _is_failed_write(error):
            raise
        raise disk_error(rank_folder, error if isinstance(error, OSError) else OSError(str(error))) from error
    gathered: list[Sums] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, sums)
    if Rank.from_environment().local_rank == 0 and step_folder.is_dir():
        write_manifest(step_folder, {name: total for each in gathered for name, total in each.items()
                                     if (step_folder / name).is_file()})


def _is_failed_write(error: Exception) -> bool:
    return isinstance(error, OSError) or "file write failed" in str(error) or "unexpected pos" in str(error)


def _common_state(state: TrainState) -> dict[str, Any]:
    """What says of a checkpoint what it is and how far the run was."""
    settings, run, progress = state.run.settings, state.run, state.progress
    return {
        "args": saved_args(
            run.model, state.layout, dtype=DTYPES[settings.train.precision], padded_vocab_size=run.padded_vocab_size,
            iteration=progress.step, make_vocab_size_divisible_by=settings.model.make_vocab_size_divisible_by,
            base={"seq_length": run.seq_length, "consumed_train_samples": progress.consumed_train_samples,
                  "consumed_valid_samples": progress.consumed_valid_samples,
                  "tokenizer_model": settings.data.tokenizer_name_or_path},
            data_parallel_size=run.dims.data, world_size=run.dims.world_size,
            micro_batch_size=settings.train.micro_batch_size, global_batch_size=run.global_batch_size,
            use_distributed_optimizer=settings.parallel.use_distributed_optimizer,
            sequence_parallel=run.dims.sequence_parallel, train_iters=settings.train.train_iters,
            seed=settings.train.seed, lr=settings.optimizer.lr,
            attention_dropout=settings.model.attention_dropout, hidden_dropout=settings.model.hidden_dropout),
        "checkpoint_version": 3.0,
        "iteration": progress.step,
        "num_floating_point_operations_so_far": progress.flops,
        "progress": asdict(progress),
    }


def _rank_state(state: TrainState) -> dict[str, Any]:
    values = _common_state(state)
    settings, run = state.run.settings, state.run
    for key, chunk in zip(_model_keys(state.chunks), state.chunks):
        values[key] = _model_state(run, chunk)
    if settings.checkpoint.save_optim:
        values["optimizer"] = state.optimizer.state_dict()
        values["opt_param_scheduler"] = state.schedule.state_dict()
    if settings.checkpoint.save_rng:
        values["rng_state"] = [_rng_state(state.device)]
    return values


def load(state: TrainState, folder: Path) -> str:
    """Fill the state from `--load`; returns one line that says what was loaded and how.

    Optimizer state of the per-rank form needs the same layout (checked before the ranks started); weights alone, and
    everything in the distributed form, may come from any layout.
    """
    settings = state.run.settings
    source = open_any(folder)
    if isinstance(source, HFFolder):
        load_weights(state, source)
        return f"loaded weights of {folder} (HF) into {state.layout}: starting at step 0"
    resume = source.has_optimizer and settings.checkpoint.load_optim and not settings.train.finetune
    if not resume:
        load_weights(state, source)
        return (f"loaded weights of {folder} (step {source.iteration}, {source.saved_layout}) into "
                f"{state.layout}: starting at step 0 without optimizer state")
    if isinstance(source, DistCheckpoint):
        return _resume_distributed(state, source, folder)
    resume_from(state, folder, "--load", with_rng=settings.checkpoint.load_rng)
    return f"resumed {folder} at step {state.progress.step} with optimizer state"


def _resume_distributed(state: TrainState, source: DistCheckpoint, folder: Path) -> str:
    read_distributed(state, source)
    saved = source.common.get("progress") or {  # Megatron-LM's own has its counters in the args
        "step": source.iteration, "consumed_train_samples": source.args.get("consumed_train_samples", 0),
        "consumed_valid_samples": source.args.get("consumed_valid_samples", 0)}
    state.progress = Progress(**saved)
    rng = read_rng(state, source) if state.run.settings.checkpoint.load_rng else None
    if rng is not None:
        _set_rng_state(state.device, rng)
    line = f"resumed {folder} at step {state.progress.step} with optimizer state"
    if source.saved_layout != state.layout:
        line += (f", saved in {source.saved_layout}, in {state.layout}; random states belong to a layout and "
                 "start anew from --seed")
    return line


def resume_from(state: TrainState, folder: Path, flag: str, *, with_rng: bool) -> None:
    """Continue a checkpoint of this layout: everything it holds, which of an adapter run is what it trains.

    Args:
        state: filled in place.
        folder: the checkpoint folder.
        flag: the flag that named it, for messages.
        with_rng: also take up the random states.
    """
    path = find_checkpoint(folder) / state.rank_folder
    saved = load_rank_file(path / MODEL_FILE, mmap=False)
    _check_optimizer_layout(state, saved["args"], f"{flag} {folder}")
    with torch.no_grad():
        for key, chunk in zip(_model_keys(state.chunks), state.chunks):
            for name, tensor in _model_state(state.run, chunk).items():
                tensor.copy_(saved[key][name])
        asked = [{name: group[name] for name in RATES if name in group} for group in state.optimizer.param_groups]
        state.optimizer.load_state_dict(saved["optimizer"])
        if state.run.settings.optimizer.override_opt_param_scheduler:
            for group, rates in zip(state.optimizer.param_groups, asked, strict=True):
                group.update(rates)
        if state.run.settings.parallel.use_distributed_optimizer:
            state.optimizer.load_parameter_state(str(path / OPTIMIZER_FILE))
    state.schedule.load_state_dict(saved["opt_param_scheduler"])
    state.progress = Progress(**saved["progress"])
    if with_rng and "rng_state" in saved:
        _set_rng_state(state.device, saved["rng_state"][0])


def load_weights(state: TrainState, source: Any) -> None:
    """Weights only, cut for this run's layout; fp32 main weights start from them."""
    load_model([chunk.module for chunk in state.chunks], source, state.layout,
               parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(),
               padded_vocab_size=state.run.padded_vocab_size)
    if state.run.model.vocab_size > source.model.vocab_size:
        fill_new_rows([chunk.module for chunk in state.chunks], source.model.vocab_size, state.run.model.vocab_size)
    state.optimizer.reload_model_params()


def _check_optimizer_layout(state: TrainState, args: Any, place: str) -> None:
    sharded = state.run.settings.parallel.use_distributed_optimizer
    if bool(getattr(args, "use_distributed_optimizer", False)) != sharded:
        raise ConfigError(f"{place}: its optimizer state was saved {'without' if sharded else 'with'} "
                          f"--use-distributed-optimizer and this run is {'with' if sharded else 'without'} it; "
                          "use the same, or start anew from the weights with --finetune.")
    if sharded and args.data_parallel_size != state.run.dims.data:
        raise ConfigError(f"{place}: its optimizer state is split over {args.data_parallel_size} data parallel "
                          f"ranks, but this run has {state.run.dims.data}; start as many, or start anew from the "
                          "weights with --finetune.")
