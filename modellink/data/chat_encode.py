"""Rendered dialogues to tokens and labels.

Between two control tokens all text is encoded in one go, as the tokenizer would encode it inside the whole prompt,
and labels follow the places of the tokens in it. Text never becomes a control token.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modellink.config.errors import ConfigError
from modellink.data.dialogue import Dialogue, Turn
from modellink.data.templates import AFTER, FRAME, SINGLE_TOKENS, LabelPolicy, Piece, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
Span = tuple[int, int]
_EXAMPLE = Dialogue((Turn("user", "a"), Turn("assistant", "b")))


@dataclasses.dataclass(frozen=True)
class Sample:
    """One encoded dialogue.

    Attributes:
        tokens: int32 [n].
        labels: int32 [n], not shifted; IGNORED where nothing is learnt.
    """

    tokens: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass
class _Chunk:
    """Text between two control tokens, or one control token.

    Attributes:
        text: the text, or the token's name.
        spans: stretches of characters that are learnt.
        fixed: no word of the dialogue is in it, so its tokens are always the same.
        control: it is a control token.
        head: characters of the template's own text that the chunk begins with.
    """

    text: str
    spans: list[Span]
    fixed: bool
    control: bool
    head: int = 0


def _chunks(pieces: Sequence[Piece], learnt: Sequence[bool]) -> list[_Chunk]:
    found: list[_Chunk] = []
    for piece, learn in zip(pieces, learnt):
        text, part, _ = piece
        if part in SINGLE_TOKENS:
            found.append(_Chunk(text, [(0, len(text))] if learn else [], True, True))
            continue
        if not found or found[-1].control:
            found.append(_Chunk("", [], True, False))
        chunk = found[-1]
        begin = len(chunk.text)
        chunk.text += text
        chunk.fixed = chunk.fixed and part in (FRAME, AFTER)
        if chunk.fixed:
            chunk.head = len(chunk.text)
        if learn and text:
            if chunk.spans and chunk.spans[-1][1] == begin:
                begin = chunk.spans.pop()[0]
            chunk.spans.append((begin, len(chunk.text)))
    return found


def token_span(encoding: Any, span: Span, length: int) -> Span:
    """Tokens that hold at least one character of a stretch.

    Args:
        encoding: of the tokenizers library, with offsets.
        span: first character and one past the last.
        length: characters of the text.

    Returns:
        first token and one past the last.
    """
    begin, end = span
    first = 0 if begin == 0 else encoding.char_to_token(begin)
    last = len(encoding) if end == length else encoding.char_to_token(end)
    if first is None or last is None:  # the normaliser swallowed the character at the border
        inside = [i for i, (start, stop) in enumerate(encoding.offsets) if start < end and stop > begin]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)
    while last < len(encoding) and encoding.token_to_chars(last)[0] < end:
        last += 1  # it holds characters of both sides
    return first, last


class ChatEncoder:
    """Encodes dialogues with one tokenizer, template and label policy.

    Raises:
        ConfigError: the tokenizer cannot tell where its tokens stand, or the policy needs control tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: Template, policy: LabelPolicy):
        if not tokenizer.is_fast:
            raise ConfigError(f"{tokenizer.name_or_path}: labels need the places of tokens in the text, which only a "
                              "tokenizer with tokenizer.json (or vocab.json and merges.txt) tells; give one.")
        if policy.name == "qwen1" and not any(piece.part == AFTER for piece in template.render(_EXAMPLE)):
            raise ConfigError(f"--label-policy qwen1 with --prompt-type {template.name}: this policy learns ChatML's "
                              "control tokens and line ends, which the template has not; choose qwen or chatml.")
        self.tokenizer = tokenizer
        self.template = template
        self.policy = policy
        self._fixed: dict[tuple[str, bool], list[int]] = {}
        self._lossless = _is_byte_level(tokenizer)

    def encode(self, dialogues: Sequence[Dialogue]) -> list[Sample]:
        """Tokens and labels of each dialogue."""
        rendered = [self.template.render(dialogue) for dialogue in dialogues]
        return self._samples([_chunks(pieces, self.policy.learnt(pieces)) for pieces in rendered])

    def prompt(self, dialogue: Dialogue) -> list[int]:
        """Token ids that ask the model for the next reply."""
        pieces = self.template.render(dialogue, ask=True)
        return self._samples([_chunks(pieces, [False] * len(pieces))])[0].tokens.tolist()

    def stop_ids(self) -> list[int]:
        """Token ids that end a reply."""
        return [self._control(token) for token in self.template.stops()]

    def _control(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(found, int)
        return found

    def _samples(self, dialogues: Sequence[list[_Chunk]]) -> list[Sample]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text is text, whatever it looks like
        # offsets cost time: only texts get them that a label border runs through, but for those of one form
        plain: list[str] = []
        placed: list[str] = []
        for chunks in dialogues:
            for chunk in chunks:
                if chunk.fixed and not _is_cut(chunk):
                    continue
                (placed if _is_cut(chunk) and not self._is_headed(chunk) else plain).append(chunk.text)
        with_ids = iter(backend.encode_batch_fast(plain, add_special_tokens=False))
        with_places = iter(backend.encode_batch(placed, add_special_tokens=False))
        return [self._assemble(chunks, with_ids, with_places) for chunks in dialogues]

    def _is_headed(self, chunk: _Chunk) -> bool:
        """Whether what is learnt is all but the template's words at the begin, as in `assistant` and its line."""
        return self._lossless and chunk.spans == [(chunk.head, len(chunk.text))]

    def _fixed_ids(self, text: str, control: bool = False) -> list[int]:
        """Tokens of a template's own text or of a control token."""
        key = text, control
        if key not in self._fixed:
            self._fixed[key] = [self._control(text)] if control else \
                self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return self._fixed[key]

    def _spans(self, chunk: _Chunk, encoding: Any, ids: list[int]) -> list[Span]:
        """The learnt tokens of a text that a label border runs through; `encoding` has places unless it is headed."""
        if self._is_headed(chunk):
            head = self._fixed_ids(chunk.text[:chunk.head])
            # byte-level tokens spell their text: the head's own tokens in front end exactly where the head ends
            if ids[:len(head)] == head:
                return [(len(head), len(ids))]
            encoding = self.tokenizer.backend_tokenizer.encode(chunk.text, add_special_tokens=False)
        return [token_span(encoding, span, len(chunk.text)) for span in chunk.spans]

    def _assemble(self, chunks: Sequence[_Chunk], with_ids: Any, with_places: Any) -> Sample:
        ids: list[int] = []
        learnt: list[Span] = []
        for chunk in chunks:
            at = len(ids)
            if _is_cut(chunk):
                encoding = next(with_ids if self._is_headed(chunk) else with_places)
                own = encoding.ids
                ids += own
                spans = self._spans(chunk, encoding, own)
            else:
                ids += self._fixed_ids(chunk.text, chunk.control) if chunk.fixed else next(with_ids).ids
                spans = [(0, len(ids) - at)] if chunk.spans else []
            learnt += [(at + begin, at + end) for begin, end in spans]
        tokens = np.array(ids, np.int32)
        labels = np.full(len(ids), IGNORED, np.int32)
        for begin, end in learnt:
            labels[begin:end] = tokens[begin:end]
        return Sample(tokens, labels)


def _is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the bytes of the tokens, one after the other, are those of the text."""
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is not None and type(decoder).__name__ == "ByteLevel"


def _is_cut(chunk: _Chunk) -> bool:
    """Whether only a part of the text is learnt."""
    return bool(chunk.spans) and chunk.spans != [(0, len(chunk.text))]
