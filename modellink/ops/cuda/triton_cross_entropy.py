"""The two Triton kernels of the cross-entropy; importing this module needs Triton.

A program reads a token's row of logits in blocks and computes in fp32. Offsets of rows are 64 bits wide: a microbatch
can have more than 2^31 logits.
"""

import triton
import triton.language as tl

# the lowest fp32: a start for maxima that is no infinity, so that their difference is a number
_LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def statistics(logits, target, top_out, sum_out, at_out, first, rows, real,  # type: ignore[no-untyped-def]
               BLOCK: tl.constexpr):
    """Maximum, sum of exponentials above it and target logit of one token, in one pass over its row.

    Args:
        logits: [tokens, rows], this rank's part of the vocabulary; only the first `real` columns are read.
        target: [tokens] int64, ids of the whole vocabulary.
        top_out, sum_out, at_out: [tokens] fp32; the target logit is 0 where another rank has the word.
        first: id of the first column.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * rows
    top = _LOWEST
    total = 0.0
    for start in range(0, real, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < real, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        # what was summed so far is put in terms of the new maximum
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    word = tl.load(target + token) - first
    is_own = (word >= 0) & (word < real)
    tl.store(top_out + token, top)
    tl.store(sum_out + token, total)
    tl.store(at_out + token, tl.load(row + word, mask=is_own, other=0.0).to(tl.float32))


@triton.jit
def derivative(logits, target, log_sum, slope, first, rows, real, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(softmax - [target]) slope over one block of a token's row, in the storage of the logits; 0 from `real` on.

    Args:
        logits: [tokens, rows], overwritten.
        target: [tokens] int64, ids of the whole vocabulary.
        log_sum: [tokens] fp32, logarithm of the sum of exponentials over all ranks.
        slope: [tokens] fp32, gradient of the tokens' losses.
        first: id of the first column.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + token * rows + columns
    factor = tl.load(slope + token)
    word = tl.load(target + token) - first
    # a masked token is not read; its zeros still become NaN where its log_sum is, as in the formula
    read = tl.where(factor == 0.0, 0, real)
    x = tl.load(places, mask=columns < read, other=float("-inf")).to(tl.float32)
    probability = tl.exp(x - tl.load(log_sum + token))
    grad = tl.where(columns == word, probability - 1.0, probability) * factor
    grad = tl.where(columns < real, grad, 0.0)
    tl.store(places, grad.to(logits.dtype.element_ty), mask=columns < rows)
