"""Model and optimizer state to and from the distributed form, in any layout, with either optimizer.

Nothing is gathered: each rank writes the blocks it holds, and reads those it needs. Keys are megatron-core's (its
`fully_reshardable` sharding). Its two optimizers differ only in the name of the fp32 main weights, so one that is
distributed over data parallel ranks and one that is not can continue each other.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from modellink.checkpoint.checksums import Sums, write_manifest
from modellink.checkpoint.dist_names import LAYER, Place, Span, blocks, place_of, spans_of
from modellink.checkpoint.dist_write import CONTENT, DistFile, file_name, write_index
from modellink.checkpoint.distributed import OPTIMIZER, RNG, DistCheckpoint
from modellink.checkpoint.publish import flush_to_disk, publish_iteration
from modellink.checkpoint.qwen15 import HEAD, chunk_rules
from modellink.checkpoint.rules import Rule
from modellink.config import ConfigError
from modellink.config.files import disk_error, remove
from modellink.ops.adamw import MOMENTS

if TYPE_CHECKING:
    from modellink.training.state import TrainState

MAIN = ("param", "fp32_param")  # keys of fp32 main weights: of the distributed optimizer, and of the core's other one
RATES = ("max_lr", "min_lr")  # of a group; the schedule prefers them to its own
GROUP_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


class Part(NamedTuple):
    """One parameter of this rank.

    Attributes:
        spans: where its indices along `dim` lie in the whole tensor.
        first: whether no other tensor or pipeline rank before this one holds the same values.
    """

    parameter: torch.nn.Parameter
    rule: Rule
    place: Place
    dim: int
    spans: list[Span]
    first: bool


def parts_of(state: "TrainState") -> Iterator[Part]:
    """Every parameter of this rank with its place in the whole model."""
    run, layout = state.run, state.layout
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for index, chunk in enumerate(state.chunks):
        parameters = dict(chunk.module.named_parameters())
        layers = layout.layer_indices(run.model.num_layers, stage, index)
        for name, rule in chunk_rules(run.model, layout, stage, index):
            stacked = LAYER.fullmatch(name)
            whole_name = f"decoder.layers.{layers[int(stacked[1])]}.{stacked[2]}" if stacked else name
            copy = rule.megatron == "output_layer.weight" and rule.hf[0].name != HEAD
            yield Part(parameters[name], rule, place_of(whole_name, rule, run.padded_vocab_size), rule.dim or 0,
                       spans_of(rule, layout.tensor, tensor_rank, run.padded_vocab_size),
                       first=not copy and (rule.dim is not None or tensor_rank == 0))


def write_distributed(state: "TrainState", target: Path, common: dict[str, Any], rng: dict[str, Any] | None) -> None:
    """Write an iteration folder; every rank takes part, and it gets its name when all of it is on the disk.

    Args:
        target: the iteration folder, on a disk that all nodes share.
        common: what is the same for all ranks.
        rng: random states of this rank's tensor and pipeline coordinates.
    """
    rank, beside = dist.get_rank(), target.parent / f".{target.name}.part"
    try:
        if rank == 0:
            remove(beside)  # of a killed run
            beside.mkdir(parents=True)
        dist.barrier()
        if not beside.is_dir():
            raise ConfigError(f"--save {target.parent}: rank 0 has made {beside.name} there, but rank {rank} does not "
                              "see it; --ckpt-format torch_dist needs a folder that all nodes share, or save with "
                              "--ckpt-format torch.")
        with DistFile(beside / file_name(rank)) as file:
            _write_parts(state, file)
            if rng is not None and parallel_state.get_data_parallel_rank() == 0:
                file.object(_rng_key(state), [rng])
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.gather_object((file.path.name, file.sum, file.written), gathered if rank == 0 else None)
        if rank == 0:
            sums: Sums = {name: total for name, total, _ in gathered}
            write_index(beside, [item for _, _, written in gathered for item in written],
                        common | _optimizer_common(state), sums)
            write_manifest(beside, sums)
            flush_to_disk(beside)
            publish_iteration(beside, target)
    except OSError as error:
        rmtree(beside, ignore_errors=True)
        raise disk_error(target, error) from error
    dist.barrier()


def _write_parts(state: "TrainState", file: DistFile) -> None:
    replica = parallel_state.get_data_parallel_rank()
    num_layers = state.run.model.num_layers
    for part in parts_of(state):
        if not part.first:
            continue
        shape, places = tuple(part.parameter.shape), (part.dim, part.spans)
        if replica == 0:
            for block, offsets in blocks(part.parameter.detach().view(-1), 0, shape, *places):
                _exhaust(file.weight(part.place, num_layers, offsets, block))
        owned = _owned(state, part.parameter) if state.run.settings.checkpoint.save_optim else None
        if owned is None or not (replica == 0 or owned.distributed):
            continue
        for name, values in owned.tensors().items():
            for block, offsets in blocks(values, owned.start, shape, *places):
                _exhaust(file.tensor(f"{OPTIMIZER}{name}.{part.place.key}", part.place.stored_shape(num_layers),
                                     part.place.stored_offsets(offsets), block))


def _exhaust(sizes: Iterator[int]) -> None:
    for _ in sizes:
        pass


class _Owned(NamedTuple):
    """Optimizer state of a parameter on this rank: elements [start, start + n) of it, flattened."""

    parameter: torch.nn.Parameter
    start: int
    main: Tensor
    state: dict[str, Tensor]
    distributed: bool

    def tensors(self) -> dict[str, Tensor]:
        """fp32 main weights, if the parameter is not itself fp32, and both moments, flat, by megatron-core's names."""
        named = {name: self.state[name].view(-1) for name in MOMENTS}
        if self.distributed or self.main is not self.parameter:
            named[MAIN[0 if self.distributed else 1]] = self.main.detach().view(-1)
        return named


def _inner_optimizers(state: "TrainState") -> list[Any]:
    return list(getattr(state.optimizer, "chained_optimizers", [state.optimizer]))


def _owned(state: "TrainState", parameter: torch.nn.Parameter) -> _Owned | None:
    """None when this data parallel rank holds nothing of the parameter's state."""
    if not state.run.settings.parallel.use_distributed_optimizer:
        main = getattr(parameter, "main_param", parameter)
        (optimizer,) = _inner_optimizers(state)
        return _Owned(parameter, 0, main, optimizer.optimizer.moments(main), distributed=False)
    for optimizer in _inner_optimizers(state):
        if parameter in optimizer.model_param_group_index_map:
            group, order = optimizer.model_param_group_index_map[parameter]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            held = optimizer._get_model_param_range_map(parameter)["param"]
            return _Owned(parameter, held.start, main, optimizer.optimizer.moments(main), distributed=True)
    return None


def _optimizer_common(state: "TrainState") -> dict[str, Any]:
    """What the optimizer holds beside tensors, as megatron-core stores it."""
    if not state.run.settings.checkpoint.save_optim:
        return {}
    (optimizer,) = _inner_optimizers(state)
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    values: dict[str, Any] = {"optimizer": {"param_groups": groups},
                              "param_state_sharding_type": CONTENT["distrib_optim_sharding_type"]}
    if getattr(optimizer, "grad_scaler", None) is not None:
        values["grad_scaler"] = optimizer.grad_scaler.state_dict()
    return {"optimizer": values, "opt_param_scheduler": state.schedule.state_dict()}


def _rng_key(state: "TrainState") -> str:
    layout = state.layout
    stage, tensor_rank = (parallel_state.get_pipeline_model_parallel_rank(),
                          parallel_state.get_tensor_model_parallel_rank())
    return f"{RNG}/shard_{stage}.{tensor_rank}_{layout.pipeline}.{layout.tensor}"


@torch.no_grad()
def read_distributed(state: "TrainState", source: DistCheckpoint) -> None:
    """Fill model, optimizer and schedule from a checkpoint of any layout."""
    _check_common(source)
    for part in parts_of(state):
        _read(state, source, part, "", 0, part.parameter.detach().view(-1))
        owned = _owned(state, part.parameter)
        if owned is None:
            continue
        for name, values in owned.tensors().items():
            prefixes = [f"{OPTIMIZER}{other}." for other in (MAIN if name in MAIN else (name,))]
            known = [prefix for prefix in prefixes if prefix + part.place.key in source.dist.tensors]
            # without main weights of their own they are the model's: fp32 of the core's other optimizer
            _read(state, source, part, (known or ([""] if name in MAIN else prefixes))[0], owned.start, values)
    saved = source.common["optimizer"]
    (optimizer,) = _inner_optimizers(state)
    override = state.run.settings.optimizer.override_opt_param_scheduler
    by_identity = {_identity(group): group for group in saved["optimizer"]["param_groups"]}
    (step,) = {group["step"] for group in by_identity.values() if "step" in group} or {None}
    for group in optimizer.param_groups:
        rates = {name: group[name] for name in RATES if override and name in group}
        saved_group = {name: value for name, value in by_identity.get(_identity(group), {}).items() if name != "params"}
        group.update(saved_group | rates)
        if step is not None:  # before the first step there is none
            group["step"] = step
    if getattr(optimizer, "grad_scaler", None) is not None and "grad_scaler" in saved:
        optimizer.grad_scaler.load_state_dict(saved["grad_scaler"])
    state.schedule.load_state_dict(source.common["opt_param_scheduler"])


def _check_common(source: DistCheckpoint) -> None:
    path = source.rank_path(0, 0)
    try:
        groups = source.common["optimizer"]["optimizer"]["param_groups"]
        steps = {group["step"] for group in groups if "step" in group}
        whole = len({_identity(group) for group in groups}) == len(groups) and "opt_param_scheduler" in source.common
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: its optimizer has no {error}; the checkpoint is not whole, or start anew from its "
                          "weights with --finetune.") from error
    if len(steps) > 1 or not whole:
        raise ConfigError(f"{path}: its parameter groups count the steps {sorted(steps)} and the schedule is "
                          f"{'there' if 'opt_param_scheduler' in source.common else 'missing'}; start anew from its "
                          "weights with --finetune.")


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(name) for name in GROUP_IDENTITY)


def _read(state: "TrainState", source: DistCheckpoint, part: Part, prefix: str, start: int, values: Tensor) -> None:
    """Fill elements of a parameter's tensor; vocabulary rows that the checkpoint has no place for become zeros."""
    key, num_layers, place = prefix + part.place.key, state.run.model.num_layers, part.place
    rows = source.padded_vocab_size if part.rule.padded else math.inf
    shape = place.shape if not part.rule.padded else (source.padded_vocab_size, *place.shape[1:])
    source.dist.find(key, place._replace(shape=shape).stored_shape(num_layers))
    for block, offsets in blocks(values, start, tuple(part.parameter.shape), part.dim, part.spans):
        stored = block
        if offsets[0] + block.shape[0] > rows:
            known = max(int(rows) - offsets[0], 0)
            block[known:].zero_()
            stored = block[:known]
        if stored.numel():
            source.dist.read_into(stored if place.layer is None else stored.unsqueeze(0), key,
                                  place.stored_offsets(offsets))


def read_rng(state: "TrainState", source: DistCheckpoint) -> dict[str, Any] | None:
    """The random states of this rank; None when the checkpoint is of another layout or has none."""
    key = _rng_key(state)
    if source.saved_layout != state.layout or key not in source.dist.objects:
        return None
    states: list[dict[str, Any]] = source.dist.load_object(key)
    return states[0]
