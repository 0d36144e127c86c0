"""How microbatches are read: when they are taken, or ahead by processes that serve a whole run."""

import itertools
import os
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from modellink.config import ConfigError
from modellink.config.settings import PosttrainSettings
from modellink.device.copies import queued_copy
from modellink.training.feed import Feed, Microbatches, Place
from modellink.training.preference import _policy_loss

STEP, COUNT = 3, 60


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Sample i holds i and the process that read it; `read` counts across processes."""

    def __init__(self) -> None:
        self.read = torch.zeros(COUNT, dtype=torch.int64).share_memory_()

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if i == 50:
            raise ConfigError("sample 50: is broken; mend it.")
        self.read[i] += 1
        return {"tokens": torch.tensor([i]), "labels": torch.tensor([os.getpid()]), "loss_mask": torch.ones(1)}


def places(first: int) -> list[Place]:
    return [(first + i, 1) for i in range(STEP)]


def following(first: int) -> Iterator[Place]:
    return ((i, 1) for i in itertools.count(first + STEP))


def take(feed: Feed, first: int) -> list[tuple[int, int]]:
    """(sample, process) of every microbatch of a step."""
    return [(int(batch["tokens"]), int(batch["labels"]))
            for batch in feed.step(places(first), lambda: following(first))]


def make(workers: int) -> tuple[Feed, Samples]:
    samples = Samples()
    return Feed(Microbatches(samples, 1, "text", False), workers), samples


def test_without_processes_a_microbatch_is_read_when_it_is_taken() -> None:
    feed, samples = make(0)
    batches = feed.step(places(0), lambda: following(0))
    assert samples.read.sum() == 0
    next(batches)
    assert samples.read[:STEP].tolist() == [1, 0, 0]


def test_one_set_of_processes_serves_all_steps_and_reads_over_their_ends() -> None:
    feed, samples = make(2)
    state = torch.get_rng_state()
    first = take(feed, 0)
    deadline = time.monotonic() + 20
    while samples.read[STEP] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert samples.read[STEP] == 1  # nobody has asked for the second step
    found = first + take(feed, STEP) + take(feed, 2 * STEP)
    assert [number for number, _ in found] == list(range(3 * STEP))
    assert len({process for _, process in found}) == 2 and os.getpid() not in {process for _, process in found}
    assert torch.equal(torch.get_rng_state(), state)
    assert samples.read.max() == 1 and samples.read[30:].sum() == 0  # ahead, but not far
    assert [number for number, _ in take(feed, 30)] == [30, 31, 32]  # a step that was not foreseen


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_is_one_sentence(workers: int) -> None:
    feed, _ = make(workers)
    with pytest.raises(ConfigError) as caught:
        take(feed, 50)
    assert caught.value.problems == ["sample 50: is broken; mend it."]


def test_a_copy_to_the_cpu_is_none() -> None:
    tensor = torch.ones(2)
    assert queued_copy(tensor, torch.device("cpu")) is tensor


class Names(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.add(func.name())
        return func(*args, **kwargs or {})


def test_the_preference_loss_takes_no_number_of_the_host_to_the_device() -> None:
    batch = {"loss_mask": torch.ones(4, 5), "reference": torch.zeros(4)}
    with Names() as names:
        total, number, report = _policy_loss(batch, PosttrainSettings(), torch.rand(4, 5))
    assert "aten::sum.dim_IntList" in names.seen and "aten::lift_fresh" not in names.seen  # what torch.tensor gives
    assert number.dtype == torch.int and number.item() == 2 and report["loss"][:2].tolist() == [total.item(), 2.0]
