"""Samples packed into bins of a fixed number of tokens."""

import numpy as np


def pack_bins(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """First fit: samples are taken in a shuffled order, and each goes into the first bin that has room for it.

    Args:
        lengths: int [n], tokens of each sample; 0 takes no room.
        capacity: tokens of a bin.
        seed: of the shuffles of samples and bins; the same arguments give the same bins everywhere.

    Returns:
        order: int64 [n], sample numbers, those of a bin one after the other in the order they went in.
        starts: int64 [bins + 1]: bin b holds `order[starts[b]:starts[b + 1]]`.

    Raises:
        ValueError: a sample is longer than a bin.
    """
    count = len(lengths)
    if count and int(np.max(lengths)) > capacity:
        raise ValueError(f"sample {int(np.argmax(lengths))} has {int(np.max(lengths))} tokens, a bin {capacity}")
    random = np.random.RandomState(seed)
    order = np.arange(count, dtype=np.int64)
    random.shuffle(order)
    # a tree whose leaves are the free tokens of the bins and whose nodes hold the larger child: the first bin with
    # enough room is found in log2(bins) steps; bins that are not begun yet are free
    leaves = 1
    while leaves < max(count, 1):
        leaves *= 2
    free = [capacity] * (2 * leaves)
    which = [0] * count
    for position, length in enumerate(np.asarray(lengths)[order].tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if free[node] < length:
                node += 1
        which[position] = node - leaves
        free[node] -= length
        while node > 1:
            node //= 2
            larger = max(free[2 * node], free[2 * node + 1])
            if free[node] == larger:
                break
            free[node] = larger
    bins = np.array(which, np.int64)
    used = int(bins.max()) + 1 if count else 0
    # the first bins are the fullest: without a shuffle training would see them all before the last, emptier ones
    place = np.arange(used, dtype=np.int64)
    random.shuffle(place)
    shuffled = place[bins] if count else bins
    counts = np.bincount(shuffled, minlength=used)
    return order[np.argsort(shuffled, kind="stable")], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
