"""Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) in every layout.

A step runs twice over its pairs: once without gradient through the reference, which is the model with its adapters
switched off or a second, frozen model, and once through the model that is trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from modellink.checkpoint.load_model import load_model
from modellink.checkpoint.sources import open_any
from modellink.config.settings import PosttrainSettings
from modellink.data.collate import Batch
from modellink.lora.adapters import AdaptedLinear
from modellink.models.build import build_chunks, transformer_config
from modellink.training.batches import StepBatches
from modellink.training.state import TrainState


def preference_loss(policy: Tensor, reference: Tensor, settings: PosttrainSettings) -> Tensor:
    """Loss of each pair.

    sigmoid: -log sigmoid(beta d), smoothed (https://arxiv.org/abs/2305.18290); hinge: max(0, 1 - beta d)
    (https://arxiv.org/abs/2305.10425); ipo: (d - 1 / (2 beta))^2 over per-token means
    (https://arxiv.org/abs/2310.12036). d is the policy's preference for the chosen answer over the reference's.

    Args:
        policy, reference: [2, pairs] fp32 log-probabilities of chosen and rejected answers; sums over tokens, for
            ipo means.

    Returns:
        [pairs] fp32.
    """
    difference = (policy[0] - policy[1]) - (reference[0] - reference[1])
    beta, smoothing = settings.dpo_beta, settings.dpo_label_smoothing
    if settings.dpo_loss_type == "hinge":
        return relu(1 - beta * difference)
    if settings.dpo_loss_type == "ipo":
        return (difference - 1 / (2 * beta)).square()
    return -logsigmoid(beta * difference) * (1 - smoothing) - logsigmoid(-beta * difference) * smoothing


def answer_logprobs(losses: Tensor, loss_mask: Tensor, mean: bool) -> Tensor:
    """Log-probability of each row's learnt tokens: losses and mask [rows, sequence] -> [rows]."""
    summed = -(losses.float() * loss_mask).sum(-1)
    return summed / loss_mask.sum(-1).clamp(min=1) if mean else summed


def _remembered(batches: Iterator[Batch], rows: list[Batch]) -> Iterator[Batch]:
    """The batches as they are taken, which `rows` keeps."""
    for batch in batches:
        rows.append(batch)
        yield batch


def _forward(batches: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Batch, Tensor]:
    batch: Any = next(batches, {})
    return batch, chunk(batch.get("tokens"), None, None, labels=batch.get("labels"))


def _reference_step(batches: Iterator[Batch], chunk: torch.nn.Module, *, mean: bool) -> tuple[Tensor, Any]:
    batch, output = _forward(batches, chunk)

    def collect(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        values = answer_logprobs(losses, batch["loss_mask"], mean)
        return values.sum(), torch.tensor(1, dtype=torch.int), {"logprobs": values}

    return output, collect


def _policy_loss(batch: Batch, settings: PosttrainSettings, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    mean = settings.dpo_loss_type == "ipo"
    policy = answer_logprobs(losses, batch["loss_mask"], mean).view(-1, 2).T  # rows alternate chosen, rejected
    reference = batch["reference"].view(-1, 2).T
    pair_losses = preference_loss(policy, reference, settings)
    rewards = settings.dpo_beta * (policy - reference).detach()
    total, count = pair_losses.sum(), pair_losses.numel()
    number = torch.full_like(total, count, dtype=torch.int)  # filled on the device: a copy from here would wait
    report = torch.stack([total.detach().clone(), number.to(total), (rewards[0] > rewards[1]).float().sum(),
                          (rewards[0] - rewards[1]).sum()])
    return total, number, {"loss": report}


def _policy_step(batches: Iterator[Batch], chunk: torch.nn.Module, *,
                 settings: PosttrainSettings) -> tuple[Tensor, Any]:
    batch, output = _forward(batches, chunk)
    return output, partial(_policy_loss, batch, settings)


@contextmanager
def adapters_off(chunks: list[Any]) -> Iterator[None]:
    """Inside the block every adapted layer computes as its frozen weights alone would."""
    layers = [module for chunk in chunks for module in chunk.modules()
              if isinstance(module, AdaptedLinear) and module._plan is not None]
    plans = [layer._plan for layer in layers]
    for layer in layers:
        layer._plan = None
    yield
    for layer, plan in zip(layers, plans):
        layer._plan = plan


def preference_objective(state: TrainState) -> "PreferenceObjective":
    """The objective of a run: adapters switched off as the reference, or a second model from `--ref-load`."""
    run = state.run
    if run.lora is not None:
        return PreferenceObjective(run.settings.post, None)
    config = transformer_config(run, state.device.name)
    chunks = [chunk.to(state.device.current()).eval() for chunk in build_chunks(run, config, state.device.name)]
    folder = run.settings.post.ref_load or run.settings.checkpoint.load
    assert folder is not None  # checked before the ranks started
    load_model(chunks, open_any(Path(folder)), state.layout, parallel_state.get_tensor_model_parallel_rank(),
               parallel_state.get_pipeline_model_parallel_rank(), padded_vocab_size=run.padded_vocab_size)
    for chunk in chunks:
        chunk.requires_grad_(False)
    return PreferenceObjective(run.settings.post, chunks)


class PreferenceObjective:
    """Runs the two passes of a step.

    Args:
        settings: beta, kind of loss, smoothing.
        reference: chunks of a frozen second model; None: the trained model with its adapters off.
    """

    def __init__(self, settings: PosttrainSettings, reference: list[Any] | None):
        self.settings = settings
        self.reference = reference

    def run(self, chunks: list[Any], make_batches: Any, *, num_microbatches: int,
            forward_only: bool) -> list[dict[str, Tensor]]:
        """Reports of the microbatches on the last stage, [] elsewhere.

        Args:
            chunks: the model that is trained.
            make_batches: gives fresh `StepBatches` of this step.
            num_microbatches: of this step.
            forward_only: evaluation, without gradients.
        """
        batches: StepBatches = make_batches()
        rows: list[Batch] = []
        first = [*tee(_remembered(batches.iterators[0], rows), len(chunks))]
        mean = self.settings.dpo_loss_type == "ipo"
        with torch.no_grad():
            if self.reference is None:
                training = [chunk.training for chunk in chunks]
                for chunk in chunks:
                    chunk.eval()  # the reference has no dropout
                with adapters_off(chunks):
                    found = self._schedule(chunks, batches, first, num_microbatches, True,
                                           partial(_reference_step, mean=mean))
                for chunk, was in zip(chunks, training):
                    chunk.train(was)
            else:
                found = self._schedule(self.reference, batches, first, num_microbatches, True,
                                       partial(_reference_step, mean=mean))
        # a stage that is not the last collects nothing, and its rows need nothing
        rows = [batch | {"reference": entry["logprobs"]} for batch, entry in zip(rows, found)] if found else rows
        return self._schedule(chunks, batches, [iter(rows) for _ in chunks], num_microbatches, forward_only,
                              partial(_policy_step, settings=self.settings))

    @staticmethod
    def _schedule(chunks: list[Any], batches: StepBatches, iterators: list[Iterator[Batch]], num_microbatches: int,
                  forward_only: bool, step: Any) -> list[dict[str, Tensor]]:
        interleaved = len(chunks) > 1
        return get_forward_backward_func()(
            forward_step_func=step, data_iterator=iterators if interleaved else iterators[0],
            model=chunks if interleaved else chunks[0], num_microbatches=num_microbatches,
            seq_length=batches.seq_length, micro_batch_size=batches.micro_batch_size, forward_only=forward_only)
