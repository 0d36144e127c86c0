"""From a checked run to an engine with weights.

Import this module only after the device was chosen (`modellink.start`): it imports megatron.core.
"""

import dataclasses
from pathlib import Path

from megatron.core import parallel_state

from modellink.checkpoint.adapter_folders import open_adapters
from modellink.checkpoint.chunks import Source
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.load_model import load_model
from modellink.checkpoint.sources import open_any
from modellink.device.base import Device
from modellink.inference.engine import Engine
from modellink.inference.memory import cache_limit, precision_of
from modellink.models.build import build_chunks, transformer_config
from modellink.models.forms import choose_forms
from modellink.models.gpt import QwenModel
from modellink.models.run import Run


def for_generation(run: Run, source: Source) -> Run:
    """The run with what generation decides: one chunk a stage, no sequence parallelism (a step has one token), and
    the precision of the weights when the command line gives none."""
    settings = dataclasses.replace(run.settings, train=dataclasses.replace(
        run.settings.train, precision=precision_of(run, source.dtype)))
    dims = dataclasses.replace(run.dims, chunks=1, sequence_parallel=False)
    return dataclasses.replace(run, settings=settings, dims=dims)


def load_chunks(run: Run, device: Device) -> tuple[list[QwenModel], Run]:
    """Build this rank's part of the model and fill it from `--load` and `--lora-load`.

    Returns:
        The chunks, and the run as generation needs it.
    """
    assert run.settings.checkpoint.load is not None, "prepare_run asks for --load"
    source = open_any(Path(run.settings.checkpoint.load))
    run = for_generation(run, source)
    choose_forms(run, device)
    # random weights would be overwritten at once
    chunks = build_chunks(run, transformer_config(run, device.name, perform_initialization=False), device.name)
    current = device.current()
    for chunk in chunks:
        chunk.to(current)
    place = (Layout(run.dims.tensor, run.dims.pipeline, 1, run.dims.stage_layers),
             parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
    load_model(chunks, source, *place, padded_vocab_size=run.padded_vocab_size)
    if run.lora is not None and run.settings.lora.lora_load is not None:
        adapters = open_adapters(Path(run.settings.lora.lora_load), source.model, run.lora.alpha)
        adapters.load_into(chunks, *place, run.padded_vocab_size)
    return chunks, run


def load_engine(run: Run, device: Device, *, max_kv_cache_bytes: int | None = None, kv_cache_dtype: str | None = None,
                prefix_reuse: bool | None = None) -> Engine:
    """An engine around `load_chunks`.

    Args:
        max_kv_cache_bytes, kv_cache_dtype, prefix_reuse: as for `Engine`; None takes `--max-kv-cache-gb`,
            `--kv-cache-dtype` and `--prefix-reuse`.
    """
    device.vary_lengths()
    chunks, run = load_chunks(run, device)
    wishes = run.settings.generation
    if max_kv_cache_bytes is None:
        max_kv_cache_bytes = cache_limit(run)
    records_steps = wishes.cuda_graphs and run.lora is None and run.dims.tensor == run.dims.pipeline == 1
    return Engine(chunks, run, device.current(), max_batch_size=wishes.max_batch_size,
                  max_kv_cache_bytes=max_kv_cache_bytes, kv_cache_dtype=kv_cache_dtype or wishes.kv_cache_dtype,
                  prefix_reuse=wishes.prefix_reuse if prefix_reuse is None else prefix_reuse,
                  recorder=device.graph_recorder if records_steps else None)
