"""Handlers of preference data: a record becomes two dialogues that differ in the last reply."""

from typing import Any, ClassVar

from modellink.config.errors import ConfigError
from modellink.data.dialogue import Dialogue, Turn
from modellink.data.handlers.dialogues import (
    ASSISTANT,
    CALL,
    STREAMS,
    AlpacaStyleInstructionHandler,
    SharegptStyleInstructionHandler,
    make_turn,
)
from modellink.data.handlers.records import MAP_KEYS, text_of

SIDES = ("chosen", "rejected")
PAIR_STREAMS = tuple(name.replace("packed_", f"packed_{side}_") for side in SIDES for name in STREAMS)


class AlpacaStylePairwiseHandler(AlpacaStyleInstructionHandler):
    """instruction, input, chosen and rejected (texts), and where they are there system and history."""

    outputs: ClassVar[tuple[str, ...]] = PAIR_STREAMS

    def convert(self, place: str, record: dict[str, Any]) -> tuple[Dialogue, ...]:
        return self.with_replies(place, record, tuple(self._side(place, record, side) for side in SIDES))

    def _side(self, place: str, record: dict[str, Any], side: str) -> str:
        value = self.key_map.need(place, record, side)
        if value is None:
            raise _no_reply(place, self.key_map.column(side))
        return text_of(place, self.key_map.column(side), value, MAP_KEYS)


class SharegptStylePairwiseHandler(SharegptStyleInstructionHandler):
    """conversations that end with a question, and chosen and rejected as turns (or texts)."""

    outputs: ClassVar[tuple[str, ...]] = PAIR_STREAMS

    def convert(self, place: str, record: dict[str, Any]) -> tuple[Dialogue, ...]:
        system, turns = self.turns(place, record)
        return tuple(self.finish(place, record, system, [*turns, self._side(place, record, side)]) for side in SIDES)

    def _side(self, place: str, record: dict[str, Any], side: str) -> Turn:
        column = self.key_map.column(side)
        value = self.key_map.need(place, record, side)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None:
            raise _no_reply(place, column)
        if isinstance(value, str):
            return Turn("assistant", text_of(place, column, value, MAP_KEYS))
        kind, text = self.message(place, column, 1, value)
        if kind not in (ASSISTANT, CALL):
            raise ConfigError(f"{place}: column {column!r} must be an assistant's turn; mend or remove this record.")
        return make_turn(place, kind, text)


def _no_reply(place: str, column: str) -> ConfigError:
    return ConfigError(f"{place}: column {column!r} is null, so there is no pair to compare; mend or remove "
                       "this record.")
