"""The ranks that hold one copy of the model: their cache, a pass through them, and what they tell each other.

Import this module only after the device was chosen (`modellink.start`): it needs megatron-core's process groups.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from modellink.inference.cache import KVCache, Piece
from modellink.inference.forward import Stage
from modellink.inference.memory import token_bytes
from modellink.inference.steps import CapturedSteps, Recorder
from modellink.models.gpt import QwenModel
from modellink.models.run import Run


class Replica:
    """This rank's part of one copy of the model.

    Attributes:
        cache: of the last call, with its tokens; None before the first.
        num_computed: tokens that went through the model.
        is_first: the rank that hears of Ctrl-C.
        is_chooser: the rank that chooses tokens for all, the first one of the last stage.
        token_bytes: of the cache, on the rank with most layers.
    """

    def __init__(self, model: QwenModel, run: Run, device: torch.device, *, is_int8: bool,
                 max_kv_cache_bytes: int | None, prefix_reuse: bool, recorder: Recorder | None):
        self.model = model
        self.device = device
        self.max_kv_cache_bytes = max_kv_cache_bytes
        self.prefix_reuse = prefix_reuse
        self.cache: KVCache | None = None
        self.num_computed = 0
        self.token_bytes = token_bytes(run.model, run.dims, run.settings.train.precision, is_int8)
        self._is_int8 = is_int8
        self._stage = Stage(model, device)
        self._steps = CapturedSteps(self._stage, recorder) if recorder is not None else None
        self._group = parallel_state.get_model_parallel_group()
        rank = dist.get_rank(self._group)
        self.is_first = rank == 0
        self.is_chooser = rank == (run.dims.pipeline - 1) * run.dims.tensor  # the ranks of a stage are neighbours

    def reserve(self, num_rows: int, length: int) -> KVCache:
        """A cache of at least this many rows and tokens; it is kept for the next call."""
        old = self.cache
        if old is None or old.num_rows < num_rows or old.length < length:
            config = self.model.config
            if self._steps is not None:
                self._steps.forget()
            if old is not None and self.max_kv_cache_bytes is not None and (
                    old.num_bytes + num_rows * length * self.token_bytes > self.max_kv_cache_bytes):
                old = self.cache = None  # both would not fit at the same time
            self.cache = KVCache([layer.number for layer in self._stage.layers], num_rows, length,
                                  config.num_query_groups // config.tensor_model_parallel_size, config.kv_channels,
                                  dtype=config.params_dtype, device=self.device, is_int8=self._is_int8)
            if old is not None and self.prefix_reuse:
                self.cache.take_rows(old)
        assert self.cache is not None
        return self.cache

    def run(self, cache: KVCache, pieces: Sequence[Piece], wanted: list[int]) -> Tensor | None:
        """One pass of these pieces; `wanted` are places among their tokens, as for `Stage.forward`."""
        tokens = [token for piece in pieces for token in piece.tokens]
        self.num_computed += len(tokens)
        cache.begin(pieces)
        if self._steps is not None and cache.is_step and len(wanted) == len(tokens):
            hidden = self._steps.run(cache, tokens)
            if hidden is not None:
                return hidden
        return self._stage.forward(cache, tokens, wanted)

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Stage.logits`."""
        return self._stage.logits(hidden)

    def agree(self, told: Tensor) -> Tensor:
        """The sum over the ranks of this replica, of which all but one give zeros; fp32 holds token ids exactly."""
        if self._group.size() == 1 or told.numel() == 0:
            return told
        told = told.to(self.device)
        dist.all_reduce(told, group=self._group)
        return told.cpu()
