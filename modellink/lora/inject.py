"""Puts adapters into a built model chunk and freezes the rest.

Import this module only after the device was chosen: it imports megatron.core.
"""

import zlib
from typing import Any

import torch

from modellink.lora.adapters import AdaptedLinear, OutputBlocks
from modellink.lora.plan import PROJECTIONS, LoraPlan


def inject(chunk: Any, plan: LoraPlan, seed: int) -> None:
    """Freeze a model chunk whose linear layers are `AdaptedLinear`, and give the targets their adapters.

    A starts as PEFT's does (uniform within 1 / root of the input size), B at zero. The values depend on the seed and
    on the place in the model only, so that every parallel layout starts from the same adapters.

    Args:
        chunk: a QwenModel.
        plan: what is trained.
        seed: of the run.
    """
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        for name, linear in adapted_linears(layer).items():
            parts = plan.parts(name)
            if parts:
                linear.attach(plan, parts, _output_blocks(chunk.config, name))
                for part in parts:
                    _initialise(linear, part, f"{seed}.{layer.layer_number}.{name}.{part}")
    for weight in _whole_modules(chunk, plan):
        weight.requires_grad_(True)
    embedding = getattr(chunk, "embedding", None)
    if embedding is not None and chunk.config.recompute_granularity == "full" \
            and not embedding.word_embeddings.weight.requires_grad:
        # The core's recompute runs backward only where an input requires a gradient; without this the first stage
        # would train nothing and say nothing.
        embedding.register_forward_hook(_require_grad)


def adapted_linears(layer: Any) -> dict[str, Any]:
    """The parallel linear layers of a transformer layer by name."""
    owners = (layer.self_attention, layer.mlp)
    return {name: getattr(owner, name) for owner in owners for name in PROJECTIONS if hasattr(owner, name)}


def initialise_magnitudes(chunk: Any) -> None:
    """DoRA: take the row lengths of the weights as they are now; call it after the base was loaded."""
    for module in chunk.modules():
        if isinstance(module, AdaptedLinear) and module._plan is not None and module._plan.use_dora:
            module.initialise_magnitude()


def _require_grad(module: Any, inputs: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def _output_blocks(config: Any, name: str) -> OutputBlocks:
    tensor = config.tensor_model_parallel_size
    if name == "linear_qkv":
        heads = config.num_attention_heads // config.num_query_groups
        widths = {"q_proj": heads * config.kv_channels, "k_proj": config.kv_channels, "v_proj": config.kv_channels}
        return OutputBlocks(config.num_query_groups // tensor, widths)
    if name == "linear_fc1":
        width = config.ffn_hidden_size // tensor
        return OutputBlocks(1, {"gate_proj": width, "up_proj": width})
    return OutputBlocks(1, {PROJECTIONS[name][0]: config.hidden_size})


@torch.no_grad()
def _initialise(linear: Any, part: str, place: str) -> None:
    weight = (getattr(linear, part) if part else linear).lora_A.weight
    rank, size = weight.shape
    start, whole = 0, size
    if linear.shards_input:
        start, whole = size * linear.tp_group.rank(), size * linear.tp_group.size()
    generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
    bound = whole**-0.5
    values = torch.empty(rank, whole).uniform_(-bound, bound, generator=generator)
    weight.copy_(values[:, start:start + size])


def _whole_modules(chunk: Any, plan: LoraPlan) -> list[torch.nn.Parameter]:
    """The tables of this chunk that are trained whole; a tied head in a stage of its own goes with the embedding."""
    tables = []
    if "word_embeddings" in plan.modules_to_save and chunk.pre_process:
        tables.append(chunk.embedding.word_embeddings.weight)
    head = "word_embeddings" if chunk.share_embeddings_and_output_weights else "output_layer"
    if head in plan.modules_to_save and chunk.post_process and chunk.output_layer.weight is not None:
        tables.append(chunk.output_layer.weight)
    return tables
