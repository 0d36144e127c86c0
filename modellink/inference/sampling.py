"""How the next token is chosen from the logits of a position: on their device, without a look of the host at them."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from modellink.device.copies import queued_copy
from modellink.inference.request import SamplingSettings
from modellink.parallel.rank import Rank


def processed(scores: Tensor, settings: SamplingSettings, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Scores after the penalties and the ban on early stop tokens; the same tensor when there are none.

    Args:
        scores: [vocabulary] fp32, logits or log-probabilities.
        prompt, answer: the tokens so far.
    """
    if is_plain(settings, len(answer)):
        return scores
    scores = scores.clone()
    if settings.repetition_penalty != 1.0:
        seen = queued_copy(torch.tensor([*{*prompt, *answer}]), scores.device)
        values = scores[seen]
        scores[seen] = torch.where(values < 0, values * settings.repetition_penalty,
                                   values / settings.repetition_penalty)
    if settings.presence_penalty != 0.0 and answer:
        scores[queued_copy(torch.tensor([*{*answer}]), scores.device)] -= settings.presence_penalty
    if len(answer) < settings.min_new_tokens:
        stops = queued_copy(torch.tensor([*settings.stop_ids], dtype=torch.int64), scores.device)
        scores.index_fill_(0, stops, -torch.inf)
    return scores


def is_plain(settings: SamplingSettings, num_tokens: int) -> bool:
    """Whether `processed` changes nothing for an answer of `num_tokens`."""
    return (settings.repetition_penalty == 1.0 and settings.presence_penalty == 0.0
            and num_tokens >= settings.min_new_tokens)


def candidates(scores: Tensor, settings: SamplingSettings, least: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens among which all are that may be sampled, and the score of each: temperature, top_k, top_p, min_p.

    Args:
        scores: [vocabulary] fp32.
        least: tokens that stay whatever the cuts say.

    Returns:
        Token ids [n] int64, and their scores over the temperature [n] fp32, -inf where a token is cut off.
    """
    scores = scores / settings.temperature
    size = scores.shape[0] if settings.top_k == 0 else min(max(settings.top_k, least), scores.shape[0])
    if settings.top_p == 1.0 and settings.min_p == 0.0 and size == scores.shape[0]:
        return torch.arange(size, device=scores.device), scores
    best, ids = scores.topk(size)  # best first
    # the first tokens always stay, also where rounding or a tiny top_p says otherwise
    stays = torch.arange(size, device=scores.device) < least
    if settings.top_p < 1.0:
        probabilities = best.softmax(0)
        before = probabilities.cumsum(0) - probabilities  # probability of everything better
        best = best.where(stays | (before < settings.top_p), -torch.inf)
    if settings.min_p > 0.0:
        shares = best.softmax(0)
        best = best.where(stays | (shares >= settings.min_p * shares[0]), -torch.inf)
    return ids, best


class Sampler:
    """Chooses the tokens of one request, with random numbers of its own: no other request changes them.

    Tokens are drawn as `torch.multinomial` draws one: every word of the vocabulary gets a number from the exponential
    distribution (from the CPU's generator, on every device), and the largest probability over number wins. So a
    request draws what transformers draws after `torch.manual_seed(seed)`, and logits that differ by rounding (another
    parallel layout) change a token only where two words tie.
    """

    def __init__(self, settings: SamplingSettings):
        self.settings = settings
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._drawn: Tensor | None = None

    def choose(self, logits: Tensor, prompt: Sequence[int] = (), answer: Sequence[int] = ()) -> Tensor:
        """The next token, [] int64 on their device, from logits [vocabulary] fp32 after `prompt` and `answer`."""
        scores = processed(logits, self.settings, prompt, answer)
        if self.settings.greedy:
            return scores.argmax()
        ids, kept = candidates(scores, self.settings)
        best = (kept.softmax(0) / self._numbers(scores)[ids]).argmax(0, keepdim=True)
        return ids[best][0]  # an index without dimensions would be read by the host

    def draw(self, scores: Tensor, count: int) -> Tensor:
        """`count` different indices of scores [n], drawn by their softmax without putting back, first drawn first."""
        return (scores.softmax(0) / self._numbers(scores)).topk(count).indices

    def draw_ahead(self, size: int) -> None:
        """Draw the numbers with which the next call of `choose` chooses among `size` words."""
        self._drawn = torch.empty(size).exponential_(generator=self._generator)

    def _numbers(self, scores: Tensor) -> Tensor:
        if self._drawn is None:
            self.draw_ahead(len(scores))
        assert self._drawn is not None
        numbers, self._drawn = self._drawn, None
        return queued_copy(numbers, scores.device)


def draw_together(samplers: Sequence[Sampler], size: int) -> None:
    """`draw_ahead` of several requests: torch draws on one core, which takes milliseconds for a large vocabulary."""
    if len(samplers) > 1:
        list(_threads().map(lambda sampler: sampler.draw_ahead(size), samplers))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // Rank.from_environment().local_world_size))
