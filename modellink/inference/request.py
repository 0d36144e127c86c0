"""What the engine is asked: token ids and how to continue them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingSettings:
    """What a request asks for.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        greedy: take the most likely token; temperature, top_k, top_p and seed have no effect then.
        temperature: logits are divided by it; above 0.
        top_k: sample from this many best tokens; 0 = all.
        top_p: of these, sample from the smallest set that has this probability; 1 = all.
        seed: of the request's own random numbers.
        stop_ids: a token that ends the answer; it is still given out, as the last token.
    """

    max_new_tokens: int = 128
    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"sampling settings out of range: {self}")

    def ends(self, token: int, num_tokens: int) -> bool:
        """Whether `token` is the last of an answer that has `num_tokens` with it."""
        return num_tokens >= self.max_new_tokens or token in self.stop_ids


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and what to do with it."""

    prompt_ids: list[int]
    sampling: SamplingSettings
