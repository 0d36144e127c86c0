"""How the next token is chosen from the logits of a position."""

import torch
from torch import Tensor

from modellink.inference.request import SamplingSettings


def candidates(logits: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """The tokens that may be sampled and how likely each is.

    Args:
        logits: [vocabulary] fp32.

    Returns:
        Token ids [n] int64 in rising order, and their probabilities [n] fp32, which add up to 1.
    """
    scores = logits / settings.temperature
    size = scores.shape[0] if settings.top_k == 0 else min(settings.top_k, scores.shape[0])
    if settings.top_p == 1.0 and size == scores.shape[0]:
        return torch.arange(size, device=scores.device), scores.softmax(0)
    best, ids = scores.topk(size)  # best first
    probabilities = best.softmax(0)
    before = probabilities.cumsum(0) - probabilities  # probability of everything better
    # the first token always stays, also where rounding or a tiny top_p says otherwise
    kept = max(1, int((before < settings.top_p).sum()))
    ids, order = ids[:kept].sort()
    probabilities = probabilities[:kept][order]
    return ids, probabilities / probabilities.sum()


class Sampler:
    """Chooses the tokens of one request, with random numbers of its own: no other request changes them.

    One number from the CPU's generator is drawn for each token and looked up in the cumulative distribution in the
    order of token ids. So the same logits give the same token on every device, and logits that differ by rounding
    (another parallel layout) move the borders between tokens by rounding only.
    """

    def __init__(self, settings: SamplingSettings):
        self.settings = settings
        self._generator = torch.Generator().manual_seed(settings.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token from logits [vocabulary] fp32."""
        if self.settings.greedy:
            return int(logits.argmax())
        ids, probabilities = candidates(logits, self.settings)
        cumulative = probabilities.cumsum(0)
        number = torch.rand(1, generator=self._generator).to(cumulative.device) * cumulative[-1]
        index = torch.searchsorted(cumulative, number, right=True)  # the first whose cumulative probability is above
        return int(ids[index.clamp(max=ids.shape[0] - 1)])
