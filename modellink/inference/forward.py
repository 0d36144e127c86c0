"""One pass of packed tokens through the layers of this rank, straight from the weights of megatron-core's modules.

The core's own forward costs several times the arithmetic of a decode step on small models (context objects, checks and
hooks in every layer), and knows no packed tokens over a cache; here a layer is its weights and `modellink.ops`.

Import this module only after the device was chosen (`modellink.start`): it imports megatron.core.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from modellink.device.copies import queued_copy
from modellink.inference.cache import KVCache
from modellink.models.gpt import QwenModel
from modellink.ops.frozen_linear import Product, frozen_linear
from modellink.ops.rms_norm import rms_norm
from modellink.ops.rotary import rotate
from modellink.ops.swiglu import swiglu


class Layer:
    """A transformer layer for generation."""

    def __init__(self, layer: Any):
        config, attention, mlp = layer.config, layer.self_attention, layer.mlp
        self.number: int = layer.layer_number
        self._groups = config.num_query_groups // config.tensor_model_parallel_size
        self._heads = config.num_attention_heads // config.num_query_groups  # of a group
        self._head_dim: int = config.kv_channels
        self._eps: float = config.layernorm_epsilon
        self._norm_1, self._norm_2 = layer.input_layernorm.weight, layer.pre_mlp_layernorm.weight
        self._qkv, self._proj = _function(attention.linear_qkv), _function(attention.linear_proj)
        self._fc1, self._fc2 = _function(mlp.linear_fc1), _function(mlp.linear_fc2)

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KVCache) -> Tensor:
        """hidden [n, hidden size]; cos, sin [n, 1, 1, head_dim] -> [n, hidden size]."""
        packed = self._qkv(rms_norm(hidden, self._norm_1, self._eps))
        packed = packed.view(-1, self._groups, self._heads + 2, self._head_dim)  # the queries of a group, key, value
        rotated = rotate(packed[:, :, :-1], cos, sin)
        query = rotated[:, :, :-1].reshape(hidden.shape[0], -1, self._head_dim)
        hidden = hidden + self._proj(cache.attend(self.number, query, rotated[:, :, -1], packed[:, :, -1]))
        return hidden + self._fc2(swiglu(self._fc1(rms_norm(hidden, self._norm_2, self._eps))))


def _taken(module: Any) -> Product:
    """The product of a module, which gives its weight away: no form needs it a second time in memory."""
    product = frozen_linear(module.weight.data, None if module.bias is None else module.bias.data)
    module.weight.data = module.weight.data.new_empty(0)
    return product


def _function(module: Any) -> Product:
    """What a parallel linear computes when nothing is trained; layers with adapters are called as they are."""
    if type(module) is ColumnParallelLinear:
        return _taken(module)
    if type(module) is RowParallelLinear and module.bias is None:
        product = _taken(module)
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return product

        def reduced(x: Tensor) -> Tensor:
            out = product(x)
            dist.all_reduce(out, group=group)
            return out

        return reduced

    def called(x: Tensor) -> Tensor:
        out, bias = module(x[:, None])  # [sequence, batch, features]
        return (out if bias is None else out + bias)[:, 0]

    return called


class Stage:
    """The layers of one pipeline stage, and the way of hidden states between stages."""

    def __init__(self, model: QwenModel, device: torch.device):
        self.model = model
        self.device = device
        self.layers = [Layer(layer) for layer in model.decoder.layers]
        self._head: Product | None = None
        if model.post_process and model.share_embeddings_and_output_weights and model.pre_process:
            self._head = frozen_linear(model.shared_embedding_or_output_weight().data)  # the embedding needs it too
        elif model.post_process:
            self._head = _taken(model.output_layer)
        self._tensor = parallel_state.get_tensor_model_parallel_world_size()
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._before = parallel_state.get_pipeline_model_parallel_prev_rank()
        self._after = parallel_state.get_pipeline_model_parallel_next_rank()

    @torch.inference_mode()
    def forward(self, cache: KVCache, tokens: list[int], wanted: list[int]) -> Tensor | None:
        """One pass through all stages; the cache was told of it by `begin`.

        Args:
            tokens: the packed tokens of the pass.
            wanted: places among them whose hidden states are asked for.

        Returns:
            [wanted, hidden size] after the final norm on the last stage, None on others.
        """
        model, config = self.model, self.model.config
        cache.place()
        if model.pre_process:
            hidden = model.embedding.word_embeddings(queued_copy(torch.tensor(tokens), self.device))
        else:
            hidden = torch.empty(len(tokens), config.hidden_size, dtype=config.params_dtype, device=self.device)
            dist.recv(hidden, self._before, self._pipeline)
        hidden = self._through_layers(hidden, cache, self.rotary_table(cache))
        cache.end()
        if not model.post_process:
            dist.send(hidden.contiguous(), self._after, self._pipeline)
            return None
        if len(wanted) < len(tokens):
            hidden = hidden[queued_copy(torch.tensor(wanted, dtype=torch.int64), self.device)]
        return self._final_norm(hidden)

    @torch.inference_mode()
    def step(self, cache: KVCache, tokens: Tensor, table: Tensor) -> Tensor:
        """A step of generation that looks at no value, so that the kernels it launches can be launched again.

        Args:
            cache: told of the step by `place_step`.
            tokens: [n] int64, one of each of the first rows.
            table: of `rotary_table`.

        Returns:
            [n, hidden size] after the final norm; there is one stage only.
        """
        hidden = self.model.embedding.word_embeddings(tokens)
        return self._final_norm(self._through_layers(hidden, cache, table))

    def rotary_table(self, cache: KVCache) -> Tensor:
        """Cosines and sines of all places of the cache, [3, length, head_dim]."""
        return self.model.rotary_pos_emb.table(cache.length, self.device)

    def _through_layers(self, hidden: Tensor, cache: KVCache, table: Tensor) -> Tensor:
        cos, sin = table[:2, cache.positions, None, None]  # for all layers, each [n, 1, 1, head_dim]
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, cache)
        return hidden

    def _final_norm(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.model.decoder.final_layernorm.weight, self.model.config.layernorm_epsilon)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocabulary] fp32 without padding rows from `forward`'s result; on every rank of the last stage."""
        assert self._head is not None, "only the last stage has a head"
        out = self._head(hidden)
        if self._tensor > 1:
            out = gather_from_tensor_model_parallel_region(out)
        return out[:, :self.model.real_vocab_size].float()
