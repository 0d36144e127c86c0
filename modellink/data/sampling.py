"""Which samples a data-parallel rank sees in a step."""


def microbatch_indices(consumed_samples: int, micro_batch_size: int, data_parallel_rank: int,
                       data_parallel_size: int, num_microbatches: int) -> list[list[int]]:
    """Sample numbers of one rank's microbatches in one step, in Megatron's order.

    Consecutive samples go to one microbatch of rank 0, of rank 1 and so on, then to the next microbatch of rank 0;
    only `consumed_samples` is needed to continue, whatever the layout was before.

    Args:
        consumed_samples: samples the whole job has trained on so far.

    Returns:
        `num_microbatches` lists of `micro_batch_size` sample numbers.
    """
    stride = micro_batch_size * data_parallel_size
    first = consumed_samples + data_parallel_rank * micro_batch_size
    return [list(range(first + k * stride, first + k * stride + micro_batch_size)) for k in range(num_microbatches)]
