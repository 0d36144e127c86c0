"""Every operator of torch_npu that this folder calls; a test holds the table against the code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One way an operator is called.

    Attributes:
        operator: `torch.ops.npu.<operator>`, also `torch_npu.<operator>`.
        tensors: the arguments by position; all are tensors, except the communicator and the number of ranks of MC2.
        keywords: the arguments by keyword.
    """

    operator: str
    tensors: int
    keywords: tuple[str, ...] = ()


CALLS: tuple[Call, ...] = (
    Call("npu_rms_norm", 2, ("epsilon",)),
    Call("npu_rotary_mul", 3),
    Call("npu_swiglu", 1, ("dim",)),
    Call("npu_fusion_attention", 3, ("head_num", "input_layout", "atten_mask", "scale", "sparse_mode")),
    Call("npu_fusion_attention", 3, ("head_num", "input_layout", "atten_mask", "scale", "sparse_mode",
                                     "actual_seq_qlen", "actual_seq_kvlen")),
    Call("npu_fused_infer_attention_score", 3, ("atten_mask", "actual_seq_lengths_kv", "num_heads", "scale",
                                                "input_layout", "num_key_value_heads", "sparse_mode")),
    Call("npu_grouped_matmul_add_", 4, ("transpose_x", "transpose_weight", "group_type")),
    Call("npu_all_gather_base_mm", 4, ("gather_output",)),
    Call("npu_mm_reduce_scatter_base", 4, ("reduce_op",)),
)
