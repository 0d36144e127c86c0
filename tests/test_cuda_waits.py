"""On an NVIDIA GPU: the host work of a microbatch never makes the host wait for the device. `pytest -m cuda`."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from cuda_environment import DEVICE, need_gpus

from modellink.config.settings import PosttrainSettings
from modellink.device.copies import queued_copy
from modellink.inference.request import SamplingSettings
from modellink.inference.sampling import Sampler
from modellink.models.gpt import RotaryTable
from modellink.training.preference import _policy_loss

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def gpu() -> None:
    need_gpus(1)


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Inside the block torch refuses every call that waits for the GPU."""
    if DEVICE == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_batch_goes_to_the_device() -> None:
    tokens = torch.arange(4096)[None]
    with waits_are_errors():
        there = queued_copy(tokens, torch.device(DEVICE))
    assert there.device.type == DEVICE and torch.equal(there.cpu(), tokens)


def test_positions_of_packed_samples() -> None:
    table, bounds = RotaryTable(16, 1e4, torch.float32), torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32)
    hidden = torch.zeros(10, 1, 4, device=DEVICE)
    whole = table.table(8, hidden.device)
    with waits_are_errors():
        wanted = table.get_rotary_seq_len(None, SimpleNamespace(input_tensor=None), hidden,
                                          SimpleNamespace(sequence_parallel=False, tensor_model_parallel_size=1),
                                          SimpleNamespace(cu_seqlens_q=bounds))
        rows = table(wanted)
    assert torch.equal(rows, whole[:, torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 1], device=DEVICE)])


def test_the_preference_loss() -> None:
    batch = {"loss_mask": torch.ones(4, 5, device=DEVICE), "reference": torch.zeros(4, device=DEVICE)}
    losses = torch.rand(4, 5, device=DEVICE)
    with waits_are_errors():
        total, number, report = _policy_loss(batch, PosttrainSettings(), losses)
    assert number.item() == 2 and report["loss"][1].item() == 2


def test_a_sampled_token() -> None:
    """Penalties, the ban on early stops, every cut and the draw; the token is that of the CPU."""
    settings = SamplingSettings(greedy=False, temperature=0.7, top_k=200, top_p=0.9, min_p=0.01, min_new_tokens=4,
                                repetition_penalty=1.2, presence_penalty=0.3, stop_ids=frozenset({7}), seed=5)
    logits = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    there = logits.to(DEVICE)
    with waits_are_errors():
        token = Sampler(settings).choose(there, [1, 2], [3, 4])
    assert int(token) == int(Sampler(settings).choose(logits, [1, 2], [3, 4]))
