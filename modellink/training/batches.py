"""The microbatches of a step on one rank."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from modellink.data.sampling import microbatch_indices
from modellink.models.run import Run

Batch = dict[str, torch.Tensor]


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


class MicrobatchReader:
    """Reads the microbatches of a step for this data parallel rank.

    Every rank reads for itself: the data is memory-mapped on its node, and tensor parallel ranks share the page cache.
    """

    def __init__(self, dataset: Any, micro_batch_size: int, device: torch.device, num_workers: int = 0):
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.device = device
        self.num_workers = num_workers

    def step(self, consumed_samples: int, num_microbatches: int, copies: int) -> list[Iterator[Batch]]:
        """One iterator over the step's microbatches for each model chunk (`copies` of them)."""
        if not needs_data():
            return [iter(()) for _ in range(copies)]
        indices = microbatch_indices(
            consumed_samples, self.micro_batch_size, parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(), num_microbatches)
        batches = list(self._read(indices))
        return [iter(batches) for _ in range(copies)]

    def _read(self, indices: list[list[int]]) -> Iterator[Batch]:
        if self.num_workers:
            loader = torch.utils.data.DataLoader(self.dataset, batch_sampler=indices, num_workers=self.num_workers)
            yield from ({name: value.to(self.device) for name, value in batch.items()} for batch in loader)
            return
        for batch in indices:
            samples = [self.dataset[index] for index in batch]
            yield {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]).to(self.device)
                   for name in samples[0]}
