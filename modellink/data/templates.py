"""Prompt templates: what stands around the turns of a dialogue, the same for training and for inference."""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from modellink.config.errors import ConfigError
from modellink.data.dialogue import Dialogue, ToolText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
ROLES = ("system", "user", "assistant")
EOS = "eos"
CONTENT = "{content}"

# what a piece of a rendered dialogue is
CONTROL, FRAME, TEXT, REPLY, REPLY_END, AFTER = "control", "frame", "text", "reply", "reply end", "after"
SINGLE_TOKENS = (CONTROL, REPLY_END)


class Piece(NamedTuple):
    """A stretch of a rendered dialogue.

    Attributes:
        text: its text, or the name of its token.
        part: `control` and `reply end` are single tokens, the latter ends a reply; `frame` and `after` are the
            template's own text, the latter follows the end of a turn; `text` and `reply` are the dialogue's.
        turn: number of the turn; -1 for the system text.
    """

    text: str
    part: str
    turn: int


class Template(Protocol):
    """What lays a template over a dialogue."""

    name: str

    def render(self, dialogue: Dialogue, ask: bool = False) -> list[Piece]:
        """The pieces of a dialogue.

        Args:
            ask: end with what stands before a reply, so that the model writes it.
        """

    def stops(self) -> list[str]:
        """Tokens that end a reply."""


@functools.cache
def _data() -> dict[str, Any]:
    text = resources.files("modellink.data").joinpath("templates.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


@functools.cache
def tool_text() -> ToolText:
    """How tools are written."""
    return ToolText(_data()["react"])


def template_names() -> list[str]:
    """Values of --prompt-type, without aliases."""
    return [*_data()["templates"], AUTO]


def template_help() -> str:
    """One line about every template."""
    abouts = [f"{name} ({row['about']})" for name, row in _data()["templates"].items()]
    aliases = [f"{name} (= {other})" for name, other in _data()["aliases"].items()]
    return "; ".join([*abouts, f"{AUTO} (the model's own chat_template)", *aliases])


def resolve_name(name: str, flag: str = "--prompt-type") -> str:
    """The template meant by a flag's value.

    Raises:
        ConfigError: there is none of that name.
    """
    known = template_names()
    name = _data()["aliases"].get(name, name)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(f"{flag} {name}: no such template; there is {', '.join(known)}"
                          f"{f'; did you mean {near[0]}?' if near else ''}.")
    return name


def _pieces(parts: Sequence[str | dict[str, str]], role: str, eos: str | None) -> list[Piece]:
    """A role's pieces with CONTENT in place of the content."""
    found: list[Piece] = []
    content_part = REPLY if role == "assistant" else TEXT
    seen = False
    for part in parts:
        if isinstance(part, dict):
            token = eos if part["control"] == EOS else part["control"]
            ends_reply = role == "assistant" and seen and REPLY_END not in [piece.part for piece in found]
            found.append(Piece(token or EOS, REPLY_END if ends_reply else CONTROL, 0))
            continue
        before, mark, after = part.partition(CONTENT)
        ended = bool(found) and found[-1].part in SINGLE_TOKENS and seen
        if before:
            found.append(Piece(before, AFTER if ended and not mark else FRAME, 0))
        if mark:
            found.append(Piece(CONTENT, content_part, 0))
            seen = True
        if after:
            found.append(Piece(after, FRAME, 0))
    return found


class FixedTemplate:
    """A template of templates.json.

    Args:
        name: from `resolve_name`.
        eos: the tokenizer's end token, for templates that end replies with it.

    Raises:
        ConfigError: the template needs an eos token and there is none.
    """

    def __init__(self, name: str, eos: str | None):
        self.name = name
        row = _data()["templates"][name]
        row = {**_data()["templates"][row["like"]], **row} if "like" in row else row
        self.default_system: str | None = row.get("default_system")
        self.roles = {role: _pieces(row[role], role, eos) for role in ROLES}
        self.between = _pieces(row.get("between", []), "user", eos)
        if eos is None and {"control": EOS} in row["assistant"]:
            raise ConfigError(f"--prompt-type {name}: it ends replies with the tokenizer's eos token, and this "
                              "tokenizer has none; add eos_token to its tokenizer_config.json.")

    def controls(self) -> set[str]:
        """Every token that the template names."""
        return {piece.text for pieces in self.roles.values() for piece in pieces if piece.part in SINGLE_TOKENS}

    def stops(self) -> list[str]:
        return [piece.text for piece in self.roles["assistant"] if piece.part == REPLY_END]

    def render(self, dialogue: Dialogue, ask: bool = False) -> list[Piece]:
        found: list[Piece] = []
        system = dialogue.system_text(self.default_system)
        if system:
            found += self._fill("system", system, -1)
        turns = dialogue.turns
        for i, turn in enumerate(turns):
            found += self._fill(turn.role, turn.content, i)
            if turn.role == "assistant" and (ask or i + 1 < len(turns)):
                found += [piece._replace(turn=i) for piece in self.between]
        if ask:
            for piece in self.roles["assistant"]:
                if piece.part == REPLY:
                    break
                found.append(piece._replace(turn=len(turns)))
        return found

    def _fill(self, role: str, content: str, turn: int) -> list[Piece]:
        return [Piece(content if piece.part in (TEXT, REPLY) else piece.text, piece.part, turn)
                for piece in self.roles[role]]


# private-use characters: a chat_template prints them as they are and has none of its own
MARK = re.compile("\ue000(\\d+)\ue001")


class AutoTemplate:
    """The tokenizer's own chat_template.

    The template is run once with marks in place of the contents, which tells its own words from theirs, and once
    with the contents, which proves that it prints them unchanged.

    Raises:
        ConfigError: the tokenizer has no chat_template.
    """

    name = AUTO

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        if not tokenizer.chat_template:
            raise ConfigError(f"--prompt-type auto: {tokenizer.name_or_path} has no chat_template; choose a template "
                              f"by name: {', '.join(template_names()[:-1])}.")
        self.tokenizer = tokenizer
        tokens = sorted((str(token) for token in tokenizer.added_tokens_decoder.values() if token.special), key=len,
                        reverse=True)
        self._controls = re.compile("|".join(map(re.escape, tokens)) if tokens else r"(?!)")
        self._skeleton = functools.lru_cache(4096)(self._render_skeleton)
        self._tokens = set(tokens)

    def controls(self) -> set[str]:
        """Every token that the template may name."""
        return set()

    def stops(self) -> list[str]:
        pieces = self._skeleton(("user", "assistant"), False)
        return [piece.text for piece in pieces if piece.part == REPLY_END]

    def render(self, dialogue: Dialogue, ask: bool = False) -> list[Piece]:
        system = dialogue.system_text(None)
        messages = [("system", system)] if system or dialogue.system is not None else []
        messages += [(turn.role, turn.content) for turn in dialogue.turns]
        first = len(messages) - len(dialogue.turns)
        roles = tuple(role for role, _ in messages)
        skeleton = self._skeleton(roles, ask)
        whole = self._run(messages, ask, dialogue.place)
        for contents in ([text for _, text in messages], [text.strip() for _, text in messages]):
            pieces = [Piece(contents[int(piece.text)] if piece.part in (TEXT, REPLY) else piece.text, piece.part,
                            piece.turn - first) for piece in skeleton]
            if "".join(piece.text for piece in pieces) == whole:
                return pieces
        raise ConfigError(f"{dialogue.place}: the chat_template of {self.tokenizer.name_or_path} changes what this "
                          "dialogue says; choose a template by name with --prompt-type.")

    def _run(self, messages: Sequence[tuple[str, str]], ask: bool, place: str) -> str:
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages], tokenize=False,
                add_generation_prompt=ask)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{place}: the chat_template of {self.tokenizer.name_or_path} refuses this dialogue "
                              f"({error}); choose a template by name with --prompt-type.") from error
        return str(text)

    def _render_skeleton(self, roles: tuple[str, ...], ask: bool) -> list[Piece]:
        """Pieces whose contents are the numbers of their messages."""
        text = self._run([(role, f"\ue000{i}\ue001") for i, role in enumerate(roles)], ask, "--prompt-type auto")
        found: list[Piece] = []
        turn = 0
        for i, part in enumerate(MARK.split(text)):
            if i % 2:
                turn = int(part)
                found.append(Piece(part, REPLY if roles[turn] == "assistant" else TEXT, turn))
                continue
            at = 0
            for match in (*self._controls.finditer(part), None):
                literal = part[at:match.start() if match else len(part)]
                if literal:
                    ended = bool(found) and found[-1].part in SINGLE_TOKENS and not literal.strip()
                    found.append(Piece(literal, AFTER if ended else FRAME, turn))
                if match:
                    ends_reply = bool(found) and found[-1].part == REPLY
                    found.append(Piece(match.group(), REPLY_END if ends_reply else CONTROL, turn))
                    at = match.end()
        return found


def make_template(name: str, tokenizer: "PreTrainedTokenizerBase", flag: str = "--prompt-type",
                  ) -> FixedTemplate | AutoTemplate:
    """The template of a flag's value for a tokenizer.

    Raises:
        ConfigError: no such template, or the tokenizer lacks tokens that it needs.
    """
    name = resolve_name(name, flag)
    if name == AUTO:
        return AutoTemplate(tokenizer)
    template = FixedTemplate(name, tokenizer.eos_token)
    vocabulary = tokenizer.get_vocab()
    missing = sorted(token for token in template.controls() if token not in vocabulary)
    if missing:
        raise ConfigError(f"{flag} {name}: the tokenizer {tokenizer.name_or_path} has no {' and no '.join(missing)}; "
                          "use a tokenizer that has it or another template.")
    return template


@dataclasses.dataclass(frozen=True)
class LabelPolicy:
    """Which tokens are learnt.

    Attributes:
        name: `assistant`: replies and the tokens that end them; `qwen1`: also every control token and the line end
            after a turn, as the first Qwen's finetune.py did; `all-but-padding`: everything.
        last_only: of the replies only the last.
    """

    name: str = "assistant"
    last_only: bool = False

    def learnt(self, pieces: Sequence[Piece]) -> list[bool]:
        """For each piece whether it is learnt."""
        if self.name == "all-but-padding":
            return [True] * len(pieces)
        last = max((piece.turn for piece in pieces if piece.part == REPLY), default=-1)
        replies = [piece.part in (REPLY, REPLY_END) and (not self.last_only or piece.turn == last) for piece in pieces]
        if self.name == "assistant":
            return replies
        return [reply or piece.part in (CONTROL, REPLY_END, AFTER) for reply, piece in zip(replies, pieces)]


LABEL_POLICIES = ("assistant", "qwen1", "all-but-padding")
