"""Which process groups a run uses on a rank, by the names of `device/buffers.py`.

The order of the names is the same on every rank.
"""

from modellink.parallel.dims import ParallelDims


def groups_in_use(dims: ParallelDims, stage: int, *, is_tied: bool, is_sharded: bool, trains: bool) -> list[str]:
    """Groups of more than one rank that run a collective: a library starts a communicator for these only.

    Args:
        dims: the layout.
        stage: the rank's pipeline stage.
        is_tied: the head is the embedding; both ends of the pipeline make their copies equal when the model is built,
            and in training add up its gradient.
        is_sharded: the optimizer's state is split over data parallel ranks (the norm of the gradient then goes over
            all ranks, otherwise over the tensor and pipeline parallel ones).
        trains: otherwise it generates: stages send each other single messages, and a replica agrees on tokens.
    """
    is_end = stage in (0, dims.pipeline - 1)
    is_sharded = is_sharded and trains
    found = {"world": dims.world_size > 1, "tp": dims.tensor > 1, "dp": dims.data > 1,
             "pp": trains and dims.pipeline > 1, "mp": not is_sharded and dims.tensor * dims.pipeline > 1,
             "embd": is_tied and is_end and dims.pipeline > 1, "optimizer": is_sharded and dims.world_size > 1}
    return [name for name, is_used in found.items() if is_used]


def single_neighbours(dims: ParallelDims) -> int:
    """Communicators of two ranks for single messages between stages; without interleaving these go in batches.

    Interleaved stages form a ring: one before, one behind. Of two stages both are the same rank, and the core sends
    the two ways through two groups, each with a communicator of its own.
    """
    return 0 if dims.chunks == 1 else 2
