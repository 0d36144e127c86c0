"""The same random weights on both sides of a comparison, without a file."""

import zlib
from typing import Any

import torch
from flags import REPO  # noqa: F401  # makes modellink importable
from torch import Tensor

from modellink.checkpoint.qwen15 import hf_rules
from modellink.config.model import ModelConfig


class DrawnWeights:
    """Weights in fp32 that follow from their names and the device alone; a `modellink.checkpoint.chunks.Source`.

    Biases and norms are random too, so that a lost or swapped one changes the loss.
    """

    dtype = torch.float32

    def __init__(self, model: ModelConfig, device: torch.device):
        self.model = model
        self.device = device
        self.shapes = {name: tensor.shape for name, (tensor, _) in hf_rules(model).items()}
        self._kept: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """The tensor with this HF name, on the device."""
        if name not in self._kept:
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(self.shapes[name], generator=generator, device=self.device)
            drawn = 1 + drawn / 10 if "norm" in name else drawn * self.model.initializer_range
            # query, key and value are read in turn, head by head
            self._kept = dict(list(self._kept.items())[-2:]) | {name: drawn}
        return self._kept[name]

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype

    def read(self, name: str, dim: int, start: int, stop: int) -> list[Tensor]:
        return [self.tensor(name).narrow(dim, start, stop - start)]

    def fill(self, model: Any) -> None:
        """Copy them into a model of transformers; a tied head is the embedding."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.tensor(name))
