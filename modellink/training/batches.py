"""The microbatches of a step on one rank."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from modellink.data.collate import Batch
from modellink.data.instruction_dataset import sample_lengths
from modellink.data.sampling import microbatch_indices
from modellink.device.copies import queued_copy
from modellink.models.run import Run
from modellink.training.feed import Feed, Microbatches, Place


class BatchSizes:
    """Global batch size at every point of a run, with Megatron's ramp-up.

    The ramp starts at START and grows by INCREMENT after equal numbers of samples until SAMPLES were consumed.
    """

    def __init__(self, run: Run):
        self.final = run.global_batch_size
        self.slice = run.settings.train.micro_batch_size * run.dims.data
        self._ramp: Any = None
        if run.settings.train.rampup_batch_size:
            start, increment, samples = map(int, run.settings.train.rampup_batch_size)
            if start < self.final:
                self._ramp = RampupBatchsizeNumMicroBatchesCalculator(
                    self.final, run.settings.train.micro_batch_size, run.dims.data, False, 1, start, increment, samples)

    def at(self, consumed_samples: int) -> int:
        """Samples of the step that starts after `consumed_samples`."""
        if self._ramp is None:
            return self.final
        self._ramp.update(consumed_samples, consistency_check=True)
        return self._ramp.current_global_batch_size

    def microbatches(self, global_batch_size: int) -> int:
        return global_batch_size // self.slice

    def consumed_after(self, steps: int) -> int:
        """Samples consumed by the first `steps` steps of a run."""
        if self._ramp is None:
            return steps * self.final
        consumed = 0
        for _ in range(steps):
            consumed += self.at(consumed)
        return consumed


def needs_data() -> bool:
    """Only the first stage reads tokens and only the last reads labels; stages between get hidden states."""
    return (parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            or parallel_state.is_pipeline_last_stage(ignore_virtual=True))


@dataclass(frozen=True)
class StepBatches:
    """The microbatches of a step.

    Attributes:
        iterators: one over all microbatches for each model chunk.
        seq_length: tokens of a row, the same on every rank: pipeline messages have this shape.
        micro_batch_size: rows of a microbatch.
    """

    iterators: list[Iterator[Batch]]
    seq_length: int
    micro_batch_size: int


class MicrobatchReader:
    """Reads the microbatches of a step for this data parallel rank.

    Every rank reads for itself: the data is memory-mapped on its node, and tensor parallel ranks share the page cache.
    Samples of unequal length (instruction data) are padded to the sequence length, to the longest sample of the global
    batch (`--variable-seq-lengths`; every rank knows all lengths from the index, so no message is needed), or packed.
    """

    def __init__(self, dataset: Any, run: Run, device: torch.device, batch_size: Callable[[int], int]):
        """Args:
            dataset: of samples, rows or pairs.
            run: the resolved run.
            device: where the batches go.
            batch_size: samples of the step that starts after a number of consumed samples.
        """
        self.run = run
        self.device = device
        self.batch_size = batch_size
        self.samples = run.settings.train.micro_batch_size
        kind = run.settings.data_kind
        self.rows = self.samples * (2 if kind == "pairs" else 1)
        self.packed = run.settings.data.pack
        self.feed = Feed(Microbatches(dataset, self.samples, kind, self.packed), run.settings.data.num_workers)
        variable = kind == "instruction" and run.settings.data.variable_seq_lengths and not self.packed
        self.lengths = sample_lengths(dataset) if variable else None

    def step(self, consumed_samples: int, copies: int) -> StepBatches:
        """The microbatches of the step that starts after `consumed_samples`, for `copies` model chunks.

        Each is read and sent to the device when the first chunk takes it.
        """
        samples = self.batch_size(consumed_samples)
        length = self._length(consumed_samples, samples)
        shape = (length * self.rows, 1) if self.packed else (length, self.rows)
        if not (needs_data() or self.packed):  # packed boundaries are needed by every stage's attention
            return StepBatches([iter(()) for _ in range(copies)], *shape)
        read = self.feed.step(list(self._places(consumed_samples, samples)),
                              partial(self._following, consumed_samples + samples))
        return StepBatches([*tee((self._place(batch) for batch in read), copies)], *shape)

    def _length(self, consumed_samples: int, samples: int) -> int:
        full = self.run.seq_length
        if self.lengths is None:
            return full
        longest = int(self.lengths[consumed_samples:consumed_samples + samples].max())
        unit = math.lcm(self.run.settings.data.pad_to_multiple_of,
                        self.run.dims.tensor if self.run.dims.sequence_parallel else 1)
        return min(-(-longest // unit) * unit, full)

    def _places(self, consumed_samples: int, samples: int) -> Iterator[Place]:
        """Where the microbatches of a step are."""
        length = self._length(consumed_samples, samples)
        for indices in microbatch_indices(
                consumed_samples, self.samples, parallel_state.get_data_parallel_rank(), self.run.dims.data,
                samples // (self.samples * self.run.dims.data)):
            yield indices[0], length

    def _following(self, consumed_samples: int) -> Iterator[Place]:
        """Where the microbatches of all later steps are, as far as the data goes."""
        while self.lengths is None or consumed_samples < len(self.lengths):
            samples = self.batch_size(consumed_samples)
            yield from self._places(consumed_samples, samples)
            consumed_samples += samples

    def _place(self, batch: Batch) -> Batch:
        return {name: value if name == "cu_seqlens" else queued_copy(value, self.device)
                for name, value in batch.items()}
