"""Turns a stream of tokens into text, whole characters at a time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from modellink.inference.request import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of the first bytes of a character


class Detokenizer:
    """Decodes one answer token by token.

    A token may end inside a UTF-8 character; text is given out only as far as its characters are whole. The pieces
    joined are the text of all tokens decoded at once.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # tokens before it no longer change the text of new ones
        self._given = 0  # characters given out of the text of the tokens from _start on

    def add(self, token: int) -> str:
        """The characters that `token` completes."""
        self._ids.append(token)
        text = self._decode(self._start)
        # of the bytes that are no character yet, only the last group can still become one
        whole = text.removesuffix(UNFINISHED)
        new = whole[self._given:]
        self._given += len(new)
        if new and whole == text:
            # keep the last token: some tokenizers write a token otherwise when nothing is before it
            self._start = len(self._ids) - 1
            self._given = len(self._decode(self._start))
        return new

    def finish(self) -> str:
        """What is left when no token follows; the bytes of a cut character become a replacement character."""
        new = self._decode(self._start)[self._given:]
        self._given += len(new)
        return new

    def _decode(self, start: int) -> str:
        text = self._tokenizer.decode(self._ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def stream_text(tokens: Iterable[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase",
                settings: Sequence[SamplingSettings]) -> Iterator[tuple[int, str, bool]]:
    """Tokens as text.

    Args:
        tokens: (request, token), a stream of `Engine.stream`.
        settings: of each request.

    Yields:
        (request, new characters, whether they are the last); a stop token has no text.
    """
    texts = [Detokenizer(tokenizer) for _ in settings]
    counts = [0] * len(settings)
    for index, token in tokens:
        counts[index] += 1
        piece = "" if token in settings[index].stop_ids else texts[index].add(token)
        is_last = settings[index].ends(token, counts[index])
        yield index, piece + (texts[index].finish() if is_last else ""), is_last


def in_order(pieces: Iterable[tuple[int, str, bool]], num_requests: int) -> Iterator[tuple[int, str, bool]]:
    """Answers that grow at the same time, one after another: the first that is not ended passes as it comes, the
    others gather until it is their turn."""
    waiting = [""] * num_requests
    ended = [False] * num_requests
    current = 0
    for index, piece, is_last in pieces:
        waiting[index] += piece
        ended[index] = is_last
        while current < num_requests and (waiting[current] or ended[current]):
            yield current, waiting[current], ended[current]
            waiting[current] = ""
            if not ended[current]:
                break
            current += 1
