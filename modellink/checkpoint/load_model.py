"""Fills the model chunks of this rank from a HF folder or a Megatron checkpoint of any layout."""

from collections.abc import Sequence

import torch

from modellink.checkpoint.chunks import Source, read_chunk
from modellink.checkpoint.layout import Layout
from modellink.lora.plan import is_adapter_name


def load_model(chunks: Sequence[torch.nn.Module], source: Source, layout: Layout, tensor_rank: int, stage: int, *,
               padded_vocab_size: int) -> None:
    """Copy weights into the parameters of this rank, converting to their dtype; all but adapters must be filled.

    Args:
        chunks: the model chunks of this rank, in order.
        source: an opened HF folder or Megatron checkpoint; its layout does not matter.
        layout: the layout of the run.
        tensor_rank: tensor parallel rank.
        stage: pipeline stage.
        padded_vocab_size: vocabulary rows of the run's model.
    """
    for index, chunk in enumerate(chunks):
        state = read_chunk(source, layout, tensor_rank, stage, index, model=source.model,
                           padded_vocab_size=padded_vocab_size)
        parameters = {name: parameter for name, parameter in chunk.named_parameters() if not is_adapter_name(name)}
        if parameters.keys() != state.keys():
            raise RuntimeError(f"the rule table and the model disagree: {sorted(parameters.keys() ^ state.keys())}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])
