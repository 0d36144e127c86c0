"""Transformer layers whose forward pass is compiled (`--compile layer`).

Import this module only after the device was chosen (`modellink.start`): it gets megatron-core's modules.
"""

from collections.abc import Sequence

import torch

from modellink.models.gpt import QwenModel


def compile_layers(chunks: Sequence[QwenModel]) -> None:
    """Compile the forward pass of every layer, and of attention's core around its kernel only.

    The core stays as it is: boundaries of packed samples are numbers that change with every batch, and each would be
    compiled anew. megatron-core keeps a number in each layer that the compiled code looks at, so every layer needs
    an entry of its own in torch's cache.
    """
    from torch._dynamo import config as dynamo  # takes seconds to import

    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    # forward with and without gradients (evaluation, recomputation) and two kinds of sizes, for each layer
    dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(layers))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 64 * len(layers))
    for layer in layers:
        attention = layer.self_attention.core_attention
        attention.forward = torch.compiler.disable(attention.forward)
        layer.forward = torch.compile(layer.forward)
