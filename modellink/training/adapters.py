"""How a LoRA run starts: frozen weights from `--load`, adapters from `--save`, `--lora-load` or anew."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from modellink.checkpoint.adapter_config import base_checksum, has_adapters
from modellink.checkpoint.adapter_folders import open_adapters
from modellink.checkpoint.sources import open_any
from modellink.lora.inject import initialise_magnitudes
from modellink.parallel.rank import Rank
from modellink.training.state import TrainState, load_weights, resume_from


def start_adapters(state: TrainState) -> str:
    """Fill the state of a LoRA run; returns one line that says what was loaded and what is trained."""
    settings = state.run.settings
    assert state.run.lora is not None
    load, save, adapters = settings.checkpoint.load, settings.checkpoint.save, settings.lora.lora_load
    base, model = "random weights", state.run.model
    if load is not None:
        source = open_any(Path(load))
        load_weights(state, source)
        base, model = f"weights of {load}", source.model
        if Rank.from_environment().local_rank == 0:  # it writes adapter_config.json on its node
            state.base_checksum = base_checksum(source)
    chunks = [chunk.module for chunk in state.chunks]
    for chunk in chunks:
        initialise_magnitudes(chunk)
    if save is not None and has_adapters(Path(save)):
        resume_from(state, Path(save), "--save", with_rng=True)
        begin = f"resumed adapters of {save} at step {state.progress.step} with optimizer state"
    elif adapters is not None:
        source_adapters = open_adapters(Path(adapters), model, state.run.lora.alpha)
        source_adapters.load_into(chunks, state.layout, parallel_state.get_tensor_model_parallel_rank(),
                                  parallel_state.get_pipeline_model_parallel_rank(), state.run.padded_vocab_size)
        begin = f"adapters of {adapters} (step {source_adapters.iteration}), starting at step 0"
    else:
        begin = "new adapters"
    if state.progress.step == 0:
        state.optimizer.reload_model_params()
    trained, frozen = _count(chunks, state)
    return (f"LoRA: {begin}, on frozen {base}; {trained:,} parameters trained and {frozen:,} frozen "
            f"({100 * trained / (trained + frozen):.2f} % trained)")


def _count(chunks: list[torch.nn.Module], state: TrainState) -> tuple[int, int]:
    """(trained, frozen) parameters of the whole model; each shard counts once, and so does each replica's copy."""
    counts = torch.zeros(2, dtype=torch.int64, device=state.device.current())
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for parameter in chunk.parameters():
            sharded = getattr(parameter, "tensor_model_parallel", False)
            copy = getattr(parameter, "shared", False)  # a tied head in a stage of its own
            if (sharded or tensor_rank == 0) and not copy:
                counts[0 if parameter.requires_grad else 1] += parameter.numel()
    dist.all_reduce(counts)
    trained, frozen = (int(count) // state.run.dims.data for count in counts.tolist())
    return trained, frozen
