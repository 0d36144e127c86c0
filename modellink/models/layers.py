"""Layers of Qwen1.5 that come in by ModuleSpec: our operations inside megatron-core's parallel linears.

Import this module only after the device was chosen (`modellink.runtime.start`): it imports megatron.core.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from modellink.ops.attention import attention
from modellink.ops.parallel_linear import column_linear, row_linear
from modellink.ops.rms_norm import rms_norm
from modellink.ops.rotary import apply_rotary
from modellink.ops.swiglu import swiglu


class RMSNorm(torch.nn.Module):
    """RMSNorm over the hidden size; its weight takes part in the gradient sum of sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **unused: Any):
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else None
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # under sequence parallelism each rank sees a part of the tokens: the core sums gradients of such parameters
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class CoreAttention(MegatronModule):
    """Causal attention of the heads of one tensor parallel rank."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **unused: Any):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
                packed_seq_params: Any = None, **unused: Any) -> Tensor:
        """[s, b, heads, d], [t, b, groups, d] twice -> [s, b, heads * d]; the mask is always causal."""
        boundaries = packed_seq_params.cu_seqlens_q.tolist() if packed_seq_params is not None else None
        return attention(query, key, value, scale=self.softmax_scale, cu_seqlens=boundaries)


class QwenSelfAttention(SelfAttention):
    """Self-attention with our rotary embedding.

    `rotary_pos_emb` is a table of `modellink.ops.rotary.rotary_table`, already cut to the positions of this call.
    Generation does not come here: `modellink.inference.forward` works on the same weights with a KV cache.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, key_value_states: Any = None,
                rotary_pos_emb: Tensor | None = None, packed_seq_params: Any = None, **unused: Any
                ) -> tuple[Tensor, Tensor | None]:
        """[s / TP under sequence parallelism, b, hidden] -> (output of the same shape, bias or None)."""
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)  # [s, b, heads or groups, d]
        if rotary_pos_emb is not None:
            query, key = apply_rotary(query, rotary_pos_emb), apply_rotary(key, rotary_pos_emb)
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(
                query, key, value, attention_mask, attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params)
        else:
            context = self.core_attention(query, key, value, packed_seq_params=packed_seq_params)
        return self.linear_proj(context)


class OwnColumnParallelLinear(ColumnParallelLinear):
    """A column parallel layer under sequence parallelism whose product and communication are one operation of ours."""

    def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """[s / TP, b, in] -> ([s, b, out / TP], bias or None)."""
        output = column_linear(input_, self.weight, self.tp_group, self.gradient_accumulation_fusion)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None


class OwnRowParallelLinear(RowParallelLinear):
    """A row parallel layer under sequence parallelism whose product and communication are one operation of ours."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in / TP] -> ([s / TP, b, out], bias or None)."""
        output = row_linear(input_, self.weight, self.tp_group, self.gradient_accumulation_fusion)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None


class QwenMLP(MLP):
    """Gated MLP with our SwiGLU."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None,
                **unused: Any) -> tuple[Tensor, Tensor | None]:
        """[s / TP under sequence parallelism, b, hidden] -> (output of the same shape, bias or None)."""
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))
