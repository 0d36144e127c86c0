"""`--save-hf`: a whole HF folder written while training, gathered tensor by tensor, so that no disk need be shared."""

import json
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from modellink.checkpoint.checksums import Sums, file_sum, write_manifest
from modellink.checkpoint.chunks import LazyTensor
from modellink.checkpoint.companions import fill_companions
from modellink.checkpoint.folders import iteration_folder_name
from modellink.checkpoint.hf import exported_config, is_shard_name, read_config, write_weights
from modellink.checkpoint.megatron import read_cut
from modellink.checkpoint.publish import publish_folder, require_space
from modellink.checkpoint.qwen15 import chunk_rules
from modellink.checkpoint.rules import HFTensor, Rule
from modellink.ops.forms import DTYPES
from modellink.parallel.groups import host_group
from modellink.training.optimizer import complete_parameters
from modellink.training.state import TrainState

Place = tuple[str, Rule, int, int]  # local Megatron name, rule, stage, chunk


def save_hf(state: TrainState, folder: Path) -> Path:
    """Write `folder/iter_NNNNNNN`, a HF folder of the current weights; every rank takes part, rank 0 writes.

    Tensors travel through host memory: HCCL and nccl would keep buffers on the device for every rank that sends.

    Returns:
        The folder that was written.
    """
    target = Path(folder) / iteration_folder_name(state.progress.step)
    timeout = timedelta(minutes=state.run.settings.parallel.distributed_timeout_minutes)
    group = host_group("EXPORT_GROUP", timeout)
    with complete_parameters(state.chunks), torch.no_grad():
        if dist.get_rank() == 0:
            _write(state, target, group)
        else:
            _send_all(state, group)
    dist.barrier()
    dist.destroy_process_group(group)
    return target


def _places(state: TrainState) -> Iterator[Place]:
    """Every Megatron tensor once, in the order of the HF tensors in it; a tied head's copy is left out."""
    layout, seen = state.layout, set()
    for chunk in range(layout.chunks):
        for stage in range(layout.pipeline):
            for name, rule in chunk_rules(state.run.model, layout, stage, chunk):
                if rule.hf[0].name not in seen:
                    seen.add(rule.hf[0].name)
                    yield name, rule, stage, chunk


def _parameter(state: TrainState, name: str, chunk: int) -> Tensor:
    tensor: Tensor = state.chunks[chunk].module.get_parameter(name).detach()
    return tensor.contiguous().cpu()


def _send_all(state: TrainState, group: dist.ProcessGroup) -> None:
    """What a rank other than 0 does: hand over its part of each tensor, in order."""
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    mine = parallel_state.get_pipeline_model_parallel_rank()
    for name, rule, stage, chunk in _places(state):
        if stage == mine and (rule.dim is not None or parallel_state.get_tensor_model_parallel_rank() == 0):
            dist.send(_parameter(state, name, chunk), 0, group)


class _Gathering:
    """Rank 0's view of all tensors; they must be asked for in order."""

    def __init__(self, state: TrainState, group: dist.ProcessGroup):
        self.state = state
        self._group = group
        self._held: tuple[str, list[Tensor]] = ("", [])

    def read(self, place: Place, hf: HFTensor) -> list[Tensor]:
        """One HF tensor, in parts that follow one another along the rule's dimension."""
        name, rule, stage, chunk = place
        if self._held[0] != rule.hf[0].name:
            self._held = rule.hf[0].name, [self._part(place, rank) for rank in self._ranks(rule)]
        dim = rule.dim or 0
        return read_cut(rule, hf.name, dim, 0, hf.shape[dim], self.state.layout.tensor,
                        self.state.run.padded_vocab_size, self._held[1].__getitem__)

    def _ranks(self, rule: Rule) -> range:
        return range(self.state.layout.tensor if rule.dim is not None else 1)

    def _part(self, place: Place, tensor_rank: int) -> Tensor:
        name, rule, stage, chunk = place
        layout = self.state.layout
        # ranks are numbered tensor first, pipeline last; the first replica of each part sends
        rank = stage * (dist.get_world_size() // layout.pipeline) + tensor_rank
        if rank == 0:
            return _parameter(self.state, name, chunk)
        part = torch.empty(rule.local_shape(layout.tensor, self.state.run.padded_vocab_size),
                           dtype=DTYPES[self.state.run.settings.train.precision])
        dist.recv(part, rank, self._group)
        return part


def _write(state: TrainState, target: Path, group: dist.ProcessGroup) -> None:
    run, gathering = state.run, _Gathering(state, group)
    dtype = DTYPES[run.settings.train.precision]
    tensors = [LazyTensor(hf.name, hf.shape, dtype, place[1].dim or 0, partial(gathering.read, place, hf))
               for place in _places(state) for hf in place[1].hf]
    require_space(target, sum(tensor.nbytes for tensor in tensors))
    stale = [path for path in target.iterdir() if is_shard_name(path.name)] if target.is_dir() else []
    with publish_folder(target, stale=stale, last="config.json") as folder:
        sums: Sums = {}
        for _ in write_weights(folder, tensors, sums=sums):
            pass
        settings = run.settings
        fill_companions(run.model, settings.checkpoint.load, settings.data.tokenizer_name_or_path, folder, dtype)
        raw, _ = read_config(folder)
        config = json.dumps(exported_config(raw, run.model, dtype), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        sums.update({path.name: file_sum(path) for path in folder.iterdir() if path.name not in sums})
        write_manifest(folder, sums)
