"""The Qwen1.5 model: megatron-core's GPTModel with our rotary table and loss."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from modellink.ops.cross_entropy import vocab_parallel_cross_entropy
from modellink.ops.rotary import rotary_table


class RotaryTable(RotaryEmbedding):
    """Gives attention the cosines and sines of the positions of a call instead of angles."""

    def __init__(self, head_dim: int, base: float, dtype: torch.dtype):
        torch.nn.Module.__init__(self)
        self.head_dim, self.base, self.dtype = head_dim, base, dtype
        self._tables: dict[torch.device, Tensor] = {}

    def table(self, num_positions: int, device: torch.device) -> Tensor:
        """[3, num_positions, head_dim]; the largest table asked for is kept."""
        kept = self._tables.get(device)
        if kept is None or kept.shape[1] < num_positions:
            rows = 1 << (num_positions - 1).bit_length()  # lengths grow: a table for each would be made again
            kept = self._tables[device] = rotary_table(rows, self.head_dim, self.base, dtype=self.dtype, device=device)
        return kept[:, :num_positions]

    def get_rotary_seq_len(self, inference_context: Any, transformer: Any, transformer_input: Tensor, config: Any,
                           packed_seq_params: Any = None, **unused: Any) -> Any:
        """Called by GPTModel before `forward`: what it returns is handed to `forward`."""
        hidden = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        length = hidden.shape[0] * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        if packed_seq_params is not None:
            return packed_seq_params.cu_seqlens_q.diff().tolist(), hidden.device
        return [length], hidden.device

    def forward(self, wanted: tuple[list[int], torch.device], *args: Any, **unused: Any) -> Tensor:
        """[3, sum of lengths, head_dim]: rows of the table for samples of these lengths, one behind the other."""
        lengths, device = wanted
        rows = self.table(max(lengths), device)
        # slices are known to the host: positions in a tensor would have to go to the device first, and wait for it
        return rows if len(lengths) == 1 else torch.cat([rows[:, :length] for length in lengths], dim=1)


class QwenModel(GPTModel):
    """One model chunk of Qwen1.5.

    Args:
        real_vocab_size: words of the vocabulary; `vocab_size` of the base class counts padding rows too.
    """

    def __init__(self, *args: Any, real_vocab_size: int, **options: Any):
        super().__init__(*args, **options)
        self.real_vocab_size = real_vocab_size
        # the base class makes a table of angles; ours holds cosines and sines in the compute dtype
        self.rotary_pos_emb = RotaryTable(self.config.kv_channels, options["rotary_base"], self.config.params_dtype)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of every token: labels [b, s], logits [s, b, rows / TP] -> [b, s] fp32."""
        target = labels.transpose(0, 1).contiguous()
        group = self.pg_collection.tp if self.pg_collection.tp.size() > 1 else None
        loss = vocab_parallel_cross_entropy(logits, target, group, self.real_vocab_size)
        return loss.transpose(0, 1).contiguous()
