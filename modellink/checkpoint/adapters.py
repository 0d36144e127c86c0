"""Opened adapters, in HF coordinates under PEFT's names; here those of this program, saved in any layout."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modellink.checkpoint.adapter_config import AdapterConfig, read_adapter_config
from modellink.checkpoint.adapter_rules import adapter_chunk_rules, shared_inputs
from modellink.checkpoint.chunks import LazyTensor, rule_tensors
from modellink.checkpoint.folders import RANK_FILE, find_checkpoint, rank_folder_name
from modellink.checkpoint.layout import Layout
from modellink.checkpoint.megatron import read_cut
from modellink.checkpoint.qwen15 import EMBEDDING, HEAD
from modellink.checkpoint.rank_file import load_rank_file
from modellink.checkpoint.rules import Rule
from modellink.checkpoint.saved_args import layout_from_args, plain_args
from modellink.checkpoint.shapes import compare_shapes
from modellink.config.errors import ConfigError
from modellink.config.model import ModelConfig
from modellink.lora.peft import PEFT_PREFIX


class Adapters(ABC):
    """Opened adapters of any form: a `Source` whose names are PEFT's, and the HF model's for modules trained whole.

    Attributes:
        folder: where they lie.
        config: what they are and which base they belong to.
        model: the base's architecture.
        iteration: steps trained; 0 when nobody says.
        dtype: of the adapters.
    """

    folder: Path
    config: AdapterConfig
    model: ModelConfig
    iteration: int = 0
    dtype: torch.dtype

    @abstractmethod
    def check(self) -> None:
        """Compare every tensor with what the configuration says, where opening has not done so."""

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""

    @abstractmethod
    def read(self, name: str, dim: int, start: int, stop: int) -> list[Tensor]:
        """Indices [start, stop) of a tensor along `dim`, as mapped views in order."""

    def peft_tensors(self, dtype: torch.dtype | None = None) -> list[LazyTensor]:
        """Every tensor of PEFT's adapter_model.safetensors; `dtype` None keeps each one's own."""
        shared = shared_inputs(self.config.plan, self.model)
        homes = {tensor.name: (rule, tensor.shape) for _, rule in self._rules(Layout(), 0, 0) for tensor in rule.hf}
        tensors = []
        for name in [*homes, *(name for name in shared if name not in homes)]:
            rule, shape = homes[shared.get(name, name)]
            names = [name if name.startswith(PEFT_PREFIX) else PEFT_PREFIX + name]
            if name == EMBEDDING and self.model.tie_word_embeddings:
                names.append(PEFT_PREFIX + HEAD)
            dim = rule.dim or 0
            tensors += [LazyTensor(peft, shape, dtype or self.dtype_of(name), dim,
                                   partial(self.read, name, dim, 0, shape[dim])) for peft in names]
        return tensors

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name in PEFT's adapter_model.safetensors; whole, on the CPU."""
        for tensor in self.peft_tensors():
            yield tensor.name, tensor.tensor()

    def load_into(self, chunks: Sequence[torch.nn.Module], layout: Layout, tensor_rank: int, stage: int,
                  padded_vocab_size: int) -> None:
        """Fill what a rank's model chunks train, from any saved layout.

        Args:
            chunks: the rank's chunks, built with this checkpoint's plan.
            layout: the layout of the run.
            tensor_rank: tensor parallel rank.
            stage: pipeline stage.
            padded_vocab_size: vocabulary rows of the run's model.
        """
        for index, chunk in enumerate(chunks):
            lazy = rule_tensors(self, self._rules(layout, stage, index), layout, tensor_rank, padded_vocab_size)
            parameters = {name: value for name, value in chunk.named_parameters() if value.requires_grad}
            if parameters.keys() != {tensor.name for tensor in lazy}:
                raise RuntimeError("the adapter rules and the model disagree: "
                                   f"{sorted(parameters.keys() ^ {tensor.name for tensor in lazy})}")
            with torch.no_grad():
                for tensor in lazy:
                    parameters[tensor.name].copy_(tensor.tensor())

    def _rules(self, layout: Layout, stage: int, chunk: int) -> list[tuple[str, Rule]]:
        return adapter_chunk_rules(self.config.plan, self.model, layout, stage, chunk)


class RankAdapters(Adapters):
    """Adapters that lie in one file a rank; files are mapped when something in them is first asked for.

    Attributes:
        layout: the layout they were saved in.
        padded_vocab_size: rows of the vocabulary tables over all tensor ranks.
        has_optimizer: whether optimizer state lies beside them.
    """

    def _first_state(self) -> tuple[Path, dict[str, Any]]:
        ranks = [path for path in (self.folder / name / RANK_FILE for name in ("mp_rank_00", "mp_rank_00_000"))
                 if path.is_file()]
        first = ranks[0] if ranks else self.folder / "mp_rank_00" / RANK_FILE
        state = load_rank_file(first)
        if "args" not in state:
            raise ConfigError(f"{first}: no args in it, so its layout is unknown; give a checkpoint as it was saved.")
        return first, state

    def _open_ranks(self, first: Path, args: dict[str, Any], state: dict[str, Any]) -> None:
        self.layout = layout_from_args(args, str(first))
        self.padded_vocab_size = int(args.get("padded_vocab_size") or 0)
        self.iteration = state["iteration"] if isinstance(state.get("iteration"), int) else 0
        self.has_optimizer = "optimizer" in state
        self._states: dict[tuple[int, int], dict[str, Any]] = {(0, 0): state}
        self._chunks: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        self._homes: dict[str, tuple[Rule, str, int, int]] = {}

    def _index(self) -> None:
        """Note where every tensor lives; the plan is known by now."""
        for chunk in range(self.layout.chunks):
            for stage in range(self.layout.pipeline):
                for name, rule in self._rules(self.layout, stage, chunk):
                    for tensor in rule.hf:
                        self._homes.setdefault(tensor.name, (rule, name, stage, chunk))
        self._shared = shared_inputs(self.config.plan, self.model)
        self.dtype = self.dtype_of(next(iter(self._homes)))

    def _adapter_tensors(self, state: dict[str, Any], chunk: int) -> dict[str, Tensor]:
        """What a rank's file holds of one chunk, under the rules' names."""
        tensors: dict[str, Tensor] = state[f"model{chunk}" if self.layout.chunks > 1 else "model"]
        return tensors

    def _chunk_state(self, tensor_rank: int, stage: int, chunk: int) -> dict[str, Tensor]:
        key = tensor_rank, stage, chunk
        if key not in self._chunks:
            path = self.folder / rank_folder_name(self.layout, tensor_rank, stage) / RANK_FILE
            if key[:2] not in self._states:
                self._states[key[:2]] = load_rank_file(path)
            tensors = self._adapter_tensors(self._states[key[:2]], chunk)
            wanted = {name: rule.local_shape(self.layout.tensor, self.padded_vocab_size)
                      for name, rule in self._rules(self.layout, stage, chunk)}
            compare_shapes(str(path), wanted, {name: tuple(value.shape) for name, value in tensors.items()})
            self._chunks[key] = {name: tensor.detach() for name, tensor in tensors.items()}
        return self._chunks[key]

    def rank_paths(self) -> list[Path]:
        """Every rank file."""
        return [self.folder / rank_folder_name(self.layout, tensor_rank, stage) / RANK_FILE
                for stage in range(self.layout.pipeline) for tensor_rank in range(self.layout.tensor)]

    def check(self) -> None:
        """Open every rank file and compare every tensor's name and shape with the rules."""
        for stage in range(self.layout.pipeline):
            for tensor_rank in range(self.layout.tensor):
                for chunk in range(self.layout.chunks):
                    self._chunk_state(tensor_rank, stage, chunk)

    def dtype_of(self, name: str) -> torch.dtype:
        _, local, stage, chunk = self._homes[self._shared.get(name, name)]
        return self._chunk_state(0, stage, chunk)[local].dtype

    def read(self, name: str, dim: int, start: int, stop: int) -> list[Tensor]:
        name = self._shared.get(name, name)
        rule, local, stage, chunk = self._homes[name]
        return read_cut(rule, name, dim, start, stop, self.layout.tensor, self.padded_vocab_size,
                        lambda tensor_rank: self._chunk_state(tensor_rank, stage, chunk)[local])


class AdapterCheckpoint(RankAdapters):
    """An opened adapter checkpoint of this program."""

    def __init__(self, folder: Path):
        self.config = read_adapter_config(folder)
        self.folder = find_checkpoint(folder)
        self.model = ModelConfig(**self.config.base_shape)
        first, state = self._first_state()
        self._open_ranks(first, plain_args(state["args"]), state)
        self._index()
