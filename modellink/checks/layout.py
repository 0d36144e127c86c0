"""Flags that must fit the architecture and the number of ranks: heads, vocabulary, sequence and batches."""

from modellink.config.errors import ProblemList
from modellink.config.model import ModelConfig
from modellink.config.settings import Settings
from modellink.parallel.dims import ParallelDims


def check_tensor_parallel(model: ModelConfig, tensor: int, problems: ProblemList) -> None:
    """Every sharded size must divide by TP."""
    sizes = {"attention heads": model.num_attention_heads, "key/value groups": model.num_query_groups,
             "MLP width": model.ffn_hidden_size, "hidden size": model.hidden_size}
    broken = [f"{name} {size}" for name, size in sizes.items() if size % tensor]
    if broken:
        fits = [str(n) for n in range(1, model.num_query_groups + 1) if not any(size % n for size in sizes.values())]
        problems.add(f"--tensor-model-parallel-size {tensor} does not divide the model's {', '.join(broken)}: "
                     f"choose one of {', '.join(fits)}.")


def padded_rows(model: ModelConfig, settings: Settings, problems: ProblemList) -> int:
    """Rows of the embedding table: the model's, padded to a multiple of TP, or `--padded-vocab-size`."""
    tensor = settings.parallel.tensor_model_parallel_size
    asked = settings.model.padded_vocab_size
    if asked is None:
        return model.padded_vocab_size(tensor, settings.model.make_vocab_size_divisible_by)
    if asked < model.vocab_size:
        problems.add(f"--padded-vocab-size {asked} is below the {model.vocab_size} vocabulary rows of the model: "
                     "rows cannot be dropped; raise it or leave it out.")
    elif asked % tensor:
        problems.add(f"--padded-vocab-size {asked} is not divisible by --tensor-model-parallel-size {tensor}: "
                     f"use {-(-asked // tensor) * tensor} or leave it out.")
    return asked


def check_sequence(model: ModelConfig, settings: Settings, dims: ParallelDims, problems: ProblemList) -> None:
    """The sample must fit the positions and split over TP."""
    length = settings.train.seq_length
    if length is None:
        return
    if length > model.max_position_embeddings:
        problems.add(f"--seq-length {length} is longer than the model's {model.max_position_embeddings} positions: "
                     "shorten it or raise --max-position-embeddings.")
    if dims.sequence_parallel and length % dims.tensor:
        problems.add(f"--seq-length {length} is not divisible by --tensor-model-parallel-size {dims.tensor}: "
                     "--sequence-parallel splits the sequence over these ranks; choose a multiple.")


def check_recompute_layers(model: ModelConfig, settings: Settings, dims: ParallelDims, problems: ProblemList) -> None:
    """A recomputed unit cannot be larger than what one rank runs at a time."""
    layers = settings.train.recompute_num_layers
    in_chunk = min(dims.chunk_layers(model.num_layers, stage) for stage in range(dims.pipeline))
    if settings.train.recompute_granularity == "full" and layers is not None and layers > in_chunk:
        problems.add(f"--recompute-num-layers {layers} is more than the {in_chunk} layers that a model chunk holds: "
                     f"use at most {in_chunk}.")


def check_batches(settings: Settings, dims: ParallelDims, problems: ProblemList) -> int:
    """Batch sizes and their ramp-up; returns the global batch size."""
    micro = settings.train.micro_batch_size
    slice_size = micro * dims.data
    # interleaving runs microbatches in groups of PP
    unit = slice_size * (dims.pipeline if dims.chunks > 1 else 1)
    total = settings.train.global_batch_size or unit
    if micro < 1:
        return total
    if total % slice_size:
        problems.add(f"--global-batch-size {total} is not divisible by --micro-batch-size {micro} x {dims.data} data "
                     f"parallel ranks = {slice_size}: use a multiple of {slice_size}.")
    elif total % unit:
        problems.add(f"--global-batch-size {total} gives {total // slice_size} microbatches, which are not divisible "
                     f"by --pipeline-model-parallel-size {dims.pipeline}, and interleaving needs that: use a multiple "
                     f"of {unit} or leave --num-layers-per-virtual-pipeline-stage out.")
    elif settings.train.rampup_batch_size is not None:
        _check_rampup(settings.train.rampup_batch_size, total, unit, problems)
    return total


def _check_rampup(words: list[str], total: int, unit: int, problems: ProblemList) -> None:
    flag = f"--rampup-batch-size {' '.join(words)}"
    try:
        start, increment, samples = (int(word) for word in words)
    except ValueError:
        problems.add(f"{flag}: START INCREMENT SAMPLES must be whole numbers.")
        return
    if start < 1 or increment < 1 or samples < 0:
        problems.add(f"{flag}: START and INCREMENT must be at least 1 and SAMPLES at least 0.")
    elif start > total or (total - start) % increment:
        problems.add(f"{flag}: the batch must grow from {start} in steps of {increment} to --global-batch-size {total} "
                     "exactly; change START or INCREMENT.")
    elif start % unit or (increment % unit and start != total):
        problems.add(f"{flag}: START and INCREMENT must be multiples of {unit} so that every batch on the way splits "
                     "into whole microbatches; change them.")
