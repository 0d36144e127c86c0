"""What torch_npu documents about its operators, as checks before the call.

Sources: the operator pages of Ascend/op-plugin (docs/zh/custom_APIs), as of torch-npu 2.13. A `..._problem` function
gives a few words, or None.
"""

import re
from collections.abc import Iterable

import torch

from modellink.ops import limits
from modellink.ops.forms import Situation, name_of_dtype
from modellink.ops.limits import HALF, dtype_problem

ATTENTION_HEAD_DIM = 768
CACHED_HEAD_DIM = 512
ATTENTION_HEADS = 256
# the pages write 1K, 2M and 1M: these are the smaller readings
PACKED_SAMPLES = 1000
ATTENTION_ROWS = 2_000_000
ATTENTION_TOKENS = 1_000_000  # of a sample, and of all packed samples of a call
# attention over a cache: prefill takes whole multiples of the first
CACHED_STEP = 16
CACHED_HEADS_OF_A_GROUP = 64
CACHED_ROWS = 65536
CACHED_KEYS_OF_A_STEP = 262144
ROTARY_HEAD_DIM = 896
ROTARY_ROWS = 1000
# features of a layer, on either side, whose weight gradient npu_grouped_matmul_add_ takes
GROUPED_WIDTH = 65535
# the reduced dimension of MC2's products, from and below
MC2_INNER = (256, 65535)
MC2_RANKS = {"Atlas A2": (2, 4, 8), "Atlas A3": (2, 4, 8, 16)}
# product families of the pages -> what a product of the family calls itself; a chip of the first generation is called
# Ascend910B with nothing behind it (torch_npu lists both kinds)
FAMILIES = {"Atlas A2": r"^Ascend910B\d", "Atlas A3": r"^Ascend910_93", "Ascend 950": r"^Ascend950"}


def require(operator: str, problem: str | None) -> None:
    """`modellink.ops.limits.require` for an operator of torch_npu."""
    limits.require(f"torch_npu.{operator}", problem, f"{limits.FLAGS}, --use-mc2")


def product_problem(product: str, families: Iterable[str] = tuple(FAMILIES)) -> str | None:
    """Whether a product is of a family that a page names; one that is not known (empty) has no problem."""
    if not product or any(re.search(FAMILIES[family], product) for family in families):
        return None
    return f"it is documented for {', '.join(families)} and not for {product}"


def rotary_problem(dtype: torch.dtype, head_dim: int, batch: int = 1, heads: int = 1) -> str | None:
    """x [sequence, batch, heads, head_dim]."""
    if head_dim % 2 or head_dim >= ROTARY_HEAD_DIM:
        return f"it takes even head sizes below {ROTARY_HEAD_DIM} and not {head_dim}"
    if batch >= ROTARY_ROWS or heads >= ROTARY_ROWS:
        return f"it takes fewer than {ROTARY_ROWS} samples and heads, and not {batch} and {heads}"
    return dtype_problem(dtype)


def _heads_problem(head_dim: int, heads: int, groups: int, largest: int) -> str | None:
    if not 1 <= head_dim <= largest:
        return f"it takes head sizes up to {largest} and not {head_dim}"
    if heads % groups or heads > ATTENTION_HEADS:
        return (f"it takes up to {ATTENTION_HEADS} heads that the key/value groups divide, and not {heads} heads with "
                f"{groups} groups")
    return None


def attention_problem(dtype: torch.dtype, head_dim: int, heads: int, groups: int) -> str | None:
    """npu_fusion_attention."""
    return _heads_problem(head_dim, heads, groups, ATTENTION_HEAD_DIM) or dtype_problem(dtype)


def samples_problem(batch: int, longest: int) -> str | None:
    """npu_fusion_attention: samples of a call (not packed) and tokens of the longest one."""
    if batch > ATTENTION_ROWS:
        return f"it takes up to {ATTENTION_ROWS} samples and not {batch}"
    if longest > ATTENTION_TOKENS:
        return f"it takes samples of up to {ATTENTION_TOKENS} tokens and not of {longest}"
    return None


def cached_attention_problem(dtype: torch.dtype, head_dim: int, heads: int, groups: int) -> str | None:
    """npu_fused_infer_attention_score, for prefill and steps: one form does both."""
    problem = _heads_problem(head_dim, heads, groups, CACHED_HEAD_DIM)
    if problem is None and head_dim % CACHED_STEP:
        problem = f"it takes head sizes that are multiples of {CACHED_STEP} and not {head_dim}"
    if problem is None and heads // groups > CACHED_HEADS_OF_A_GROUP:
        problem = (f"it takes up to {CACHED_HEADS_OF_A_GROUP} heads to a key/value group and not {heads} heads with "
                   f"{groups} groups")
    return problem or dtype_problem(dtype, HALF)


def cache_problem(rows: int, queries: int, room: int) -> str | None:
    """npu_fused_infer_attention_score: rows of a call, queries of each, and keys that a row has room for."""
    if rows > CACHED_ROWS:
        return f"it takes up to {CACHED_ROWS} rows and not {rows}"
    if queries == 1 and room > CACHED_KEYS_OF_A_STEP:
        return f"it takes steps over rows of up to {CACHED_KEYS_OF_A_STEP} tokens and not of {room}"
    return None


def weight_gradient_problem(dtype: torch.dtype, total: torch.dtype) -> str | None:
    """npu_grouped_matmul_add_."""
    if total != torch.float32:
        return f"it adds to a float32 gradient and not to {name_of_dtype(total)}"
    return dtype_problem(dtype, HALF)


def mc2_problem(dtype: torch.dtype, ranks: int, inner: int, product: str = "") -> str | None:
    """npu_all_gather_base_mm and npu_mm_reduce_scatter_base: `inner` is the reduced dimension."""
    if product_problem(product, MC2_RANKS):
        return product_problem(product, MC2_RANKS)
    # what some product takes where the product is not known
    sizes = next(sizes for family, sizes in reversed(MC2_RANKS.items()) if not product_problem(product, [family]))
    if ranks not in sizes:
        return f"it takes {', '.join(map(str, sizes))} tensor parallel ranks and not {ranks}"
    low, high = MC2_INNER
    if not low <= inner < high:
        return f"it takes products over {low} to {high - 1} features and not over {inner}"
    return dtype_problem(dtype, HALF)


def mc2_layers_problem(situation: Situation) -> str | None:
    """Whether MC2 can do all products of a run's tensor parallel layers."""
    problems = (mc2_problem(situation.dtype, situation.tensor, width, situation.product)
                for width in situation.widths)
    return next((problem for problem in problems if problem), None)
