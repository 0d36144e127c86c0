"""Transformer layers whose forward pass is compiled (`--compile layer`).

Import this module only after the device was chosen (`modellink.start`): it gets megatron-core's modules.
"""

import warnings
from collections.abc import Sequence

import torch

from modellink.models.gpt import QwenModel


def compile_layers(chunks: Sequence[QwenModel], *, is_packed: bool) -> None:
    """Compile the forward pass of every layer; layers of one shape share the compiled code.

    Args:
        chunks: the model chunks of this rank.
        is_packed: rows hold packed samples. Their boundaries are numbers that change with every batch, and each would
            be compiled anew, so attention's core stays as it is.
    """
    from torch._dynamo import config  # takes seconds to import

    # megatron-core warns of what is deprecated in every linear layer, and a warning would cut the graph there
    config.ignore_logger_methods.add(warnings.warn)
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        if is_packed:
            core = layer.self_attention.core_attention
            core.forward = torch.compiler.disable(core.forward)
        layer.forward = torch.compile(layer.forward)
