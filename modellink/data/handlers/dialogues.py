"""Handlers of instruction data: a record becomes one dialogue."""

import dataclasses
import json
import re
from typing import Any, ClassVar

from modellink.config.errors import ConfigError
from modellink.data.batches import Batch, missing_column
from modellink.data.dialogue import Dialogue, Turn, replies
from modellink.data.handlers.records import MAP_KEYS, KeyMap, parse_row, text_of
from modellink.data.templates import tool_text

STREAMS = ("packed_input_ids", "packed_attention_mask", "packed_labels")
SYSTEM, USER, ASSISTANT, OBSERVATION, CALL = "system", "user", "assistant", "observation", "call"
# ShareGPT's words for who speaks, and the ones that other sets use for the same
ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM,
         "observation": OBSERVATION, "tool": OBSERVATION, "function": OBSERVATION, "function_call": CALL}
ROLE_TAGS = {"user_tag": USER, "assistant_tag": ASSISTANT, "observation_tag": OBSERVATION, "function_tag": CALL,
             "system_tag": SYSTEM}


@dataclasses.dataclass(frozen=True)
class InstructionHandler:
    """What all handlers of dialogues share.

    Attributes:
        key_map: names in the file.
    """

    key_map: KeyMap = KeyMap()

    outputs: ClassVar[tuple[str, ...]] = STREAMS
    columns = None
    ends_documents = False
    text_format = None
    template = "qwen"

    def dialogues(self, batch: Batch) -> list[tuple[Dialogue, ...]]:
        """The dialogues of each row; one here, two in preference data.

        Raises:
            ConfigError: a row that is not what the handler reads; names it.
        """
        return [self.row(batch, i) for i in range(len(batch.rows))]

    def row(self, batch: Batch, i: int) -> tuple[Dialogue, ...]:
        """The dialogues of row `i`."""
        place = batch.place(i)
        found = self.convert(place, parse_row(batch, i, "instruction"))
        for dialogue in found:
            if not replies(dialogue):
                raise ConfigError(f"{place}: the dialogue has no assistant turn, there is nothing to learn from it; "
                                  "mend or remove this record.")
        return found

    def convert(self, place: str, record: dict[str, Any]) -> tuple[Dialogue, ...]:
        """The dialogues of a record."""
        return (self.dialogue(place, record),)

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        """The one dialogue of a record."""
        raise NotImplementedError


def _reply(place: str, column: str, value: Any) -> str:
    if value is None:
        raise ConfigError(f"{place}: column {column!r} is null, so the dialogue has no assistant turn; mend or remove "
                          "this record.")
    return text_of(place, column, value, MAP_KEYS)


class AlpacaStyleInstructionHandler(InstructionHandler):
    """instruction, input, output, and where they are there system and history (pairs of question and answer)."""

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        self.key_map.need(place, record, "instruction")  # the first column is the first one missed
        reply = _reply(place, self.key_map.column("output"), self.key_map.need(place, record, "output"))
        return self.with_replies(place, record, (reply,))[0]

    def with_replies(self, place: str, record: dict[str, Any], answers: tuple[str, ...]) -> tuple[Dialogue, ...]:
        """The dialogue of a record, once with each of the answers."""
        keys = self.key_map
        asked = [keys.text(place, record, "instruction"), keys.text(place, record, "input", needed=False)]
        turns = [*self._history(place, record), Turn("user", "\n".join(part for part in asked if part))]
        system = keys.text(place, record, "system", needed=False) or None
        tools = tool_text().system(place, keys.value(record, "tools"))
        return tuple(Dialogue((*turns, Turn("assistant", answer)), system, tools, place) for answer in answers)

    def _history(self, place: str, record: dict[str, Any]) -> list[Turn]:
        column = self.key_map.column("history")
        pairs = _json_list(place, column, self.key_map.value(record, "history"))
        turns: list[Turn] = []
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ConfigError(f"{place}: column {column!r} must hold pairs of question and answer; mend or remove "
                                  "this record.")
            turns += [Turn("user", text_of(place, column, pair[0], MAP_KEYS)),
                      Turn("assistant", text_of(place, column, pair[1], MAP_KEYS))]
        return turns


def _json_list(place: str, column: str, value: Any) -> list[Any]:
    """A list, or the text of one (in tables of text)."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{place}: column {column!r} is no valid JSON list: {error.msg}; mend or remove this "
                              "record.") from error
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise ConfigError(f"{place}: column {column!r} holds a {type(value).__name__} where a list is needed; name the "
                          f"right one with {MAP_KEYS}.")
    return value


class GeneralInstructionHandler(AlpacaStyleInstructionHandler):
    """instruction, input and output under the alpaca template."""

    template = "alpaca"

    def _history(self, place: str, record: dict[str, Any]) -> list[Turn]:
        return []


class SharegptStyleInstructionHandler(InstructionHandler):
    """conversations of from and value, with tools where they are there."""

    turns_column = "conversations"
    role_key, content_key = "from", "value"

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        system, turns = self.turns(place, record)
        return self.finish(place, record, system, turns)

    def finish(self, place: str, record: dict[str, Any], system: str | None, turns: list[Turn]) -> Dialogue:
        """The dialogue with the columns beside the turns."""
        system = self.key_map.text(place, record, "system", needed=False) or system
        return Dialogue(tuple(turns), system, tool_text().system(place, self.key_map.value(record, "tools")), place)

    def turns(self, place: str, record: dict[str, Any]) -> tuple[str | None, list[Turn]]:
        """System text and turns of a record."""
        column = self.key_map.columns.get("conversations", self.turns_column)
        if column not in record:
            raise missing_column(place, column, record, MAP_KEYS)
        system: str | None = None
        turns: list[Turn] = []
        for number, message in enumerate(_json_list(place, column, record[column]), 1):
            kind, text = self.message(place, column, number, message)
            if kind == SYSTEM:
                if system is not None or turns:
                    raise ConfigError(f"{place}: turn {number} of {column!r} is a system text, which may only come "
                                      "first; mend or remove this record.")
                system = text
            else:
                turns.append(make_turn(place, kind, text))
        return system, turns

    def message(self, place: str, column: str, number: int, message: Any) -> tuple[str, str]:
        """Who speaks (USER, ...) in a turn, and what."""
        tags = self.key_map.tags
        role_key, content_key = tags.get("role_tag", self.role_key), tags.get("content_tag", self.content_key)
        if not isinstance(message, dict) or role_key not in message or content_key not in message:
            keys = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise ConfigError(f"{place}: turn {number} of {column!r} needs {role_key!r} and {content_key!r}, it has "
                              f"{keys}; name them with {MAP_KEYS} (tags: role_tag, content_tag).")
        return self.kind(place, column, number, message[role_key]), text_of(place, column, message[content_key],
                                                                            MAP_KEYS)

    def kind(self, place: str, column: str, number: int, role: Any) -> str:
        """What a role's name stands for."""
        named = {self.key_map.tags[tag]: kind for tag, kind in ROLE_TAGS.items() if tag in self.key_map.tags}
        known = {**ROLES, **named}
        if role not in known:
            raise ConfigError(f"{place}: turn {number} of {column!r} is spoken by {role!r}; known are "
                              f"{', '.join(known)}, others are named with {MAP_KEYS} (tags: user_tag, ...).")
        return known[role]


def make_turn(place: str, kind: str, text: str) -> Turn:
    """A turn; what tools are asked and say is written in the ReAct form."""
    if kind == CALL:
        return Turn("assistant", tool_text().call(place, text))
    if kind == OBSERVATION:
        return Turn("user", tool_text().observation(text))
    return Turn("assistant" if kind == ASSISTANT else "user", text)


class MessagesInstructionHandler(SharegptStyleInstructionHandler):
    """messages of role and content as in OpenAI's API, with tool_calls, tool turns and tools."""

    turns_column = "messages"
    role_key, content_key = "role", "content"

    def message(self, place: str, column: str, number: int, message: Any) -> tuple[str, str]:
        calls = message.get("tool_calls") or message.get("function_call") if isinstance(message, dict) else None
        if not calls:
            return super().message(place, column, number, message)
        said = text_of(place, column, message.get(self.key_map.tags.get("content_tag", "content")), MAP_KEYS)
        return ASSISTANT, "\n".join(part for part in (said, tool_text().call(place, calls)) if part)


class QwenConversationHandler(SharegptStyleInstructionHandler):
    """conversations of from (user, assistant) and value, as Qwen's finetune.py reads them: a first turn that is not
    the user's is left out."""

    def turns(self, place: str, record: dict[str, Any]) -> tuple[str | None, list[Turn]]:
        system, turns = super().turns(place, record)
        return system, turns[1:] if turns and turns[0].role != "user" else turns


@dataclasses.dataclass(frozen=True)
class LlamaFactoryInstructionHandler(InstructionHandler):
    """Alpaca or ShareGPT form, whichever the columns are.

    Attributes:
        sources: names in each input, where dataset_info.json tells them.
    """

    sources: tuple[KeyMap, ...] = ()

    def row(self, batch: Batch, i: int) -> tuple[Dialogue, ...]:
        if not self.sources:
            return super().row(batch, i)
        return LlamaFactoryInstructionHandler(self.sources[batch.source_of(i)]).row(batch, i)

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        handler: InstructionHandler
        column = self.key_map.column("conversations")
        turns = record.get(column, record.get("messages"))
        if turns is None:
            handler = AlpacaStyleInstructionHandler(self.key_map)
        elif column in record and not _has_role(turns):
            handler = SharegptStyleInstructionHandler(self.key_map)
        else:
            handler = MessagesInstructionHandler(self.key_map)
        return handler.dialogue(place, record)


def _has_role(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]


class BelleMultiTurnInstructionHandler(InstructionHandler):
    """Turns written as `Human:` and `Assistant:` lines in instruction; output is the last reply."""

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        text = self.key_map.text(place, record, "instruction")
        reply = _reply(place, self.key_map.column("output"), self.key_map.need(place, record, "output"))
        first, *parts = re.split(r"^[ \t]*(Human|Assistant):", text, flags=re.MULTILINE)
        turns = [Turn("user", first.strip())] if first.strip() else []
        for who, said in zip(parts[::2], parts[1::2]):
            turns.append(Turn("user" if who == "Human" else "assistant", said.strip()))
        if turns and turns[-1].role == "assistant" and not turns[-1].content:
            turns.pop()  # the empty `Assistant:` that output fills
        return Dialogue((*turns, Turn("assistant", reply.strip())), place=place)


class MOSSInstructionHandler(InstructionHandler):
    """MOSS: chat holds turns with Human and MOSS texts between its own marks."""

    marks = re.compile(r"^\s*<\|(Human|MOSS)\|>:|<eo[hm]>\s*$")

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        chat = record.get("chat")
        if not isinstance(chat, dict):
            if "chat" not in record:
                raise missing_column(place, "chat", record, MAP_KEYS)
            raise ConfigError(f"{place}: column 'chat' holds a {type(chat).__name__} where an object of turns is "
                              "needed; mend or remove this record.")
        turns: list[Turn] = []
        for name in sorted(chat, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
            turn = chat[name]
            if not turn:  # tables fill up short dialogues with nulls
                continue
            for key, role in (("Human", USER), ("MOSS", ASSISTANT)):
                if key not in turn:
                    raise missing_column(f"{place}, {name}", key, turn, MAP_KEYS)
                said = self.marks.sub("", text_of(place, key, turn[key], MAP_KEYS)).strip()
                turns.append(make_turn(place, role, said))
        return Dialogue(tuple(turns), place=place)


class MOSSMultiTurnHandler(MOSSInstructionHandler):
    """The same; the original wrote another model's token ids here."""


class LeetcodePythonInstructionHandler(InstructionHandler):
    """A problem, and as the reply its code and explanation."""

    def dialogue(self, place: str, record: dict[str, Any]) -> Dialogue:
        problem, code, explanation = (self.key_map.text(place, record, name) for name in
                                      ("code_with_problem", "code_only", "explanation_only"))
        return Dialogue((Turn("user", problem.split("```", maxsplit=1)[0].strip()),
                         Turn("assistant", f"{code}\n{explanation}")), place=place)
