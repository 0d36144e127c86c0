"""The part of a model chunk that training changes: adapters and modules trained whole."""

import torch


def trainable_state(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors by parameter name, without the frozen base; views of the parameters."""
    return {name: parameter.detach() for name, parameter in chunk.named_parameters() if parameter.requires_grad}
