"""Parameters and bytes of one rank. Parameters are exact; activations are an estimate from the tensors saved for the
backward pass (attention scores are never held, so recompute of attention alone changes little).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from modellink.checkpoint.adapter_rules import adapter_chunk_rules
from modellink.checkpoint.layout import Layout
from modellink.device.buffers import parse_buffer_sizes, peer_bytes
from modellink.lora.plan import is_adapter_name
from modellink.models.run import Run
from modellink.parallel.communicators import single_neighbours

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32 = 4


@dataclass(frozen=True)
class ChunkPlan:
    """One model chunk of one pipeline stage.

    Attributes:
        layers: global numbers of its layers.
        has_embedding, has_head: whether the embedding, and the final norm with the output layer, are in it.
        parameters: of one tensor parallel rank, adapters included.
        trained: those of them that are not frozen.
    """

    layers: range
    has_embedding: bool
    has_head: bool
    parameters: int
    trained: int


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; all sizes are bytes on one of its ranks.

    `reference` is the frozen second model of preference tuning without adapters, `communicators` the buffers of
    collectives by group on devices where they are counted.
    """

    stage: int
    chunks: tuple[ChunkPlan, ...]
    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    communicators: Mapping[str, int] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Parameters of one rank."""
        return sum(chunk.parameters for chunk in self.chunks)

    @property
    def trained(self) -> int:
        """Those of them that are not frozen."""
        return sum(chunk.trained for chunk in self.chunks)

    @property
    def num_layers(self) -> int:
        return sum(len(chunk.layers) for chunk in self.chunks)

    @property
    def total(self) -> int:
        return (self.weights + self.reference + self.gradients + self.optimizer + self.activations
                + sum(self.communicators.values()))

    @property
    def least(self) -> int:
        """What the rank needs even if the activations are overestimated by a third: a check must not stop a job that
        may fit."""
        return self.total - self.activations // 4


def layer_parameters(run: Run) -> int:
    """Parameters of one transformer layer on one tensor parallel rank (norms are whole on every rank)."""
    model, tensor = run.model, run.dims.tensor
    qkv = model.hidden_size + 2 * model.num_query_groups * model.head_dim
    matrices = qkv * model.hidden_size + model.hidden_size**2 + 3 * model.ffn_hidden_size * model.hidden_size
    bias = qkv if model.add_qkv_bias else 0
    return (matrices + bias) // tensor + 2 * model.hidden_size


def chunk_plans(run: Run, stage: int) -> tuple[ChunkPlan, ...]:
    """The model chunks of a pipeline stage, in megatron-core's order: chunk c holds every PP-th group of layers."""
    dims, model = run.dims, run.model
    size = dims.chunk_layers(model.num_layers, stage)
    before = sum(dims.stage_layers[:stage]) if dims.stage_layers else stage * size
    table = run.padded_vocab_size // dims.tensor * model.hidden_size
    plans = []
    for chunk in range(dims.chunks):
        start = chunk * dims.pipeline * size + before
        first = stage == 0 and chunk == 0
        last = stage == dims.pipeline - 1 and chunk == dims.chunks - 1
        parameters = size * layer_parameters(run)
        if first:
            parameters += table
        if last:
            parameters += model.hidden_size
            # a tied head is the embedding itself on one stage, and a second copy on a stage of its own
            if not (model.tie_word_embeddings and first):
                parameters += table
        adapters, trained = trained_parameters(run, stage, chunk) if run.lora is not None else (0, parameters)
        plans.append(ChunkPlan(range(start, start + size), first, last, parameters + adapters, trained))
    return tuple(plans)


def trained_parameters(run: Run, stage: int, chunk: int) -> tuple[int, int]:
    """(adapters, adapters and tables trained whole) of one model chunk of a LoRA run on one tensor parallel rank."""
    assert run.lora is not None
    layout = Layout(run.dims.tensor, run.dims.pipeline, run.dims.chunks)
    sizes = {name: math.prod(rule.local_shape(layout.tensor, run.padded_vocab_size))
             for name, rule in adapter_chunk_rules(run.lora, run.model, layout, stage, chunk)}
    return sum(size for name, size in sizes.items() if is_adapter_name(name)), sum(sizes.values())


def microbatch_tokens(run: Run) -> int:
    """Token positions of one forward pass: a preference pair is two rows."""
    rows = 2 if run.settings.data_kind == "pairs" else 1
    return run.seq_length * run.settings.train.micro_batch_size * rows


def activation_bytes_per_layer(run: Run) -> int:
    """Bytes that one layer keeps of one microbatch for the backward pass.

    Elements per token, with t = TP and s = t under sequence parallel (otherwise 1): both norms keep their input and
    output (4h/s); attention keeps query, key, value, the rotated query and key, and its output ((3h + 3kv)/t); the MLP
    keeps its first product and the gated one (3f/t). After Korthikanti et al. 2022, arXiv 2205.05198, with SwiGLU and
    without the scores.
    """
    model, dims = run.model, run.dims
    split = dims.tensor if dims.sequence_parallel else 1
    kv = model.num_query_groups * model.head_dim
    tokens = microbatch_tokens(run)
    elements = (4 * model.hidden_size * tokens // split
                + (3 * model.hidden_size + 3 * kv + 3 * model.ffn_hidden_size) * tokens // dims.tensor)
    return elements * ELEMENT_BYTES[run.settings.train.precision]


def chunks_in_flight(run: Run, stage: int) -> int:
    """Model chunks whose activations a stage holds at once, over all microbatches (1F1B and interleaved schedules)."""
    dims = run.dims
    microbatches = run.global_batch_size // (run.settings.train.micro_batch_size * dims.data)
    if dims.chunks == 1:
        return min(microbatches, dims.pipeline - stage)
    warmup = (dims.pipeline - stage - 1) * 2 + (dims.chunks - 1) * dims.pipeline
    return min(microbatches * dims.chunks, warmup + 1)


def activation_bytes(run: Run, stage: int) -> int:
    """Bytes of activations at the peak of one rank of a stage."""
    model, dims, train = run.model, run.dims, run.settings.train
    layers = dims.chunk_layers(model.num_layers, stage)
    whole = activation_bytes_per_layer(run)
    in_flight = chunks_in_flight(run, stage)
    tokens = microbatch_tokens(run)
    width = ELEMENT_BYTES[train.precision]
    boundary = tokens * model.hidden_size // (dims.tensor if dims.sequence_parallel else 1) * width
    if train.recompute_granularity == "full":
        unit = train.recompute_num_layers or 1
        if train.recompute_method == "uniform":
            kept = -(-layers // unit) * boundary * in_flight
            working = unit * whole
        else:
            kept = (unit * boundary + (layers - unit) * whole) * in_flight
            working = whole
        total = kept + working
    else:
        total = layers * whole * in_flight
    if stage == dims.pipeline - 1:
        # logits and their gradient
        total += 2 * tokens * (run.padded_vocab_size // dims.tensor) * width
    return total


def communicator_bytes(run: Run, stage: int) -> dict[str, int]:
    """Bytes of communication buffers on a rank of a stage, by group; NPUs alone take them beside torch's allocator in
    a size that is known beforehand."""
    if run.device != "npu":
        return {}
    sizes = parse_buffer_sizes(run.settings.parallel.hccl_buffer_size)
    found = {name: sizes.communicator_bytes(name) for name in run.groups(stage)}
    neighbours = single_neighbours(run.dims)
    return found | ({"neighbours": neighbours * peer_bytes()} if neighbours else {})


def stage_plan(run: Run, stage: int) -> StagePlan:
    """Layers, parameters and bytes of one rank of a pipeline stage."""
    chunks = chunk_plans(run, stage)
    parameters, trained = sum(chunk.parameters for chunk in chunks), sum(chunk.trained for chunk in chunks)
    precision = run.settings.train.precision
    # Adam's two moments, and fp32 main weights where training itself is narrower
    state = 2 * FP32 + (FP32 if precision != "fp32" else 0)
    shards = run.dims.data if run.settings.parallel.use_distributed_optimizer else 1
    weights = parameters * ELEMENT_BYTES[precision]
    has_reference = run.settings.post.stage == "dpo" and run.lora is None
    return StagePlan(stage, chunks, weights=weights, reference=weights if has_reference else 0,
                     gradients=trained * FP32, optimizer=-(-trained * state // shards),
                     activations=activation_bytes(run, stage), communicators=communicator_bytes(run, stage))
