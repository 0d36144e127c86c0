"""Microbatches in the order in which steps ask for them: read when they are needed, or ahead by processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from modellink.config.errors import ConfigError
from modellink.data.collate import Batch, pack, pad, stack

# number of its first sample in the data set, tokens of a row
Place = tuple[int, int]
Item = TypeVar("Item")


class Microbatches(Dataset[tuple[Place, Batch | ConfigError]]):
    """The microbatch at each place.

    Args:
        dataset: samples, rows of samples (packed), or pairs.
        samples: of a microbatch.
        kind: `text`, `instruction` or `pairs`.
        packed: whether rows hold several samples.
    """

    def __init__(self, dataset: Any, samples: int, kind: str, packed: bool):
        self.dataset = dataset
        self.samples = samples
        self.kind = kind
        self.packed = packed

    def __getitem__(self, place: Place) -> tuple[Place, Batch | ConfigError]:
        first, length = place
        try:
            return place, self._collate([self.dataset[first + i] for i in range(self.samples)], length)
        except ConfigError as error:  # raised in a process of the loader it would carry that process' traceback
            return place, error

    def _collate(self, samples: list[Any], length: int) -> Batch:
        if self.packed:
            return pack(samples, length)
        if self.kind == "pairs":
            return pad([side for pair in samples for side in pair], length)
        return pad(samples, length) if self.kind == "instruction" else stack(samples)


class Feed:
    """Reads microbatches.

    With processes, one loader serves the whole run and reads over the end of a step: it is told which places probably
    come next. A step that asks for others starts it anew, so a wrong guess costs time and nothing else.

    Args:
        source: a `Microbatches`.
        num_workers: processes that read ahead, two microbatches each; 0: a microbatch is read when it is asked for.
    """

    def __init__(self, source: Dataset[tuple[Place, Batch | ConfigError]], num_workers: int):
        self.source = source
        self.num_workers = num_workers
        self._stream: Iterator[tuple[Place | None, Any]] = iter(())

    def step(self, places: Sequence[Place], following: Callable[[], Iterable[Place]]) -> Iterator[Batch]:
        """The microbatches at the places of a step, each read when it is taken.

        Args:
            places: of this step.
            following: gives the places that the steps after this one will probably ask for.

        Raises:
            ConfigError: (on taking) what the data set says of a sample.
        """
        for number, place in enumerate(places):
            found = self._ahead(places[number:], following) if self.num_workers else self.source[place][1]
            if isinstance(found, ConfigError):
                raise found
            yield found

    def _ahead(self, wanted: Sequence[Place], following: Callable[[], Iterable[Place]]) -> Batch | ConfigError:
        found: Any
        place, found = next(self._stream, (None, None))
        if place != wanted[0]:
            # with a generator of its own the loader takes no number from the one that dropout uses
            self._stream = iter(DataLoader(self.source, batch_size=None, sampler=chain(wanted, following()),
                                           num_workers=self.num_workers, collate_fn=_as_it_is,
                                           generator=torch.Generator()))
            _, found = next(self._stream)
        return found


def _as_it_is(item: Item) -> Item:
    return item
