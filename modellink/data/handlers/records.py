"""Rows of any format as dictionaries, and values that must be text."""

import dataclasses
import json
from typing import Any

from modellink.config.errors import ConfigError
from modellink.data.batches import Batch, missing_column

ABSENT = object()
MAP_KEYS = "--map-keys"


def parse_row(batch: Batch, i: int, example: str = "text") -> dict[str, Any]:
    """Row `i` as a dictionary.

    Raises:
        ConfigError: a row that is no JSON object; names it.
    """
    row = batch.rows[i]
    if isinstance(row, tuple):
        return dict(zip(batch.names_of(i), row))
    try:
        record = json.loads(row)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{batch.place(i)}: not UTF-8 text ({error.reason}); convert the file to UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{batch.place(i)}: broken JSON: {error.msg}; every line must be a JSON object, "
                          "or the whole file a list of them.") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{batch.place(i)}: a JSON {type(record).__name__} where an object is needed, "
                          f'as in {{"{example}": "..."}}.')
    return record


def text_of(place: str, column: str, value: Any, flag: str = "--json-keys") -> str:
    """A value that must be text; a missing value (null) is an empty text.

    Raises:
        ConfigError: it is something else, or holds half a character.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{place}: column {column!r} holds a {type(value).__name__} where text is needed; "
                          f"name a text column with {flag}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half a character, as "\\ud83d" alone in JSON
        raise ConfigError(f"{place}: column {column!r} holds half a character ({error.reason}); "
                          "mend or remove this record.") from error
    return value


# what map-keys calls a column, and what the handlers do
OTHER_NAMES = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
COLUMNS = ("instruction", "input", "output", "system", "history", "tools", "conversations", "chosen", "rejected",
           "title", "question_body", "answer_body", "code_with_problem", "code_only", "explanation_only")
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """Names in the file.

    Attributes:
        columns: a handler's column -> the file's column, where they differ.
        tags: role_tag and content_tag are the keys of a turn, the others the names of roles.
    """

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)

    def column(self, name: str) -> str:
        """The file's name of a handler's column."""
        return self.columns.get(name, name)

    def value(self, record: dict[str, Any], name: str) -> Any:
        """A column that may be absent; None then."""
        return record.get(self.column(name))

    def need(self, place: str, record: dict[str, Any], name: str) -> Any:
        """A column that must be there.

        Raises:
            ConfigError: it is not; names the columns found.
        """
        value = record.get(self.column(name), ABSENT)
        if value is ABSENT:
            raise missing_column(place, self.column(name), record, MAP_KEYS)
        return value

    def text(self, place: str, record: dict[str, Any], name: str, *, needed: bool = True) -> str:
        """A text column."""
        value = self.need(place, record, name) if needed else self.value(record, name)
        return text_of(place, self.column(name), value, MAP_KEYS)


def parse_map_keys(text: str | None) -> KeyMap:
    """Read --map-keys.

    Raises:
        ConfigError: not a JSON object, or a key that no handler has.
    """
    if not text:
        return KeyMap()
    example = """as in --map-keys '{"prompt": "question", "response": "answer"}'"""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--map-keys {text}: not valid JSON: {error.msg}; give a JSON object, {example}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--map-keys {text}: a JSON {type(found).__name__}; give a JSON object, {example}.")
    return key_map(found, f"--map-keys {text}")


def key_map(found: dict[str, Any], where: str) -> KeyMap:
    """A KeyMap from the object of --map-keys or from one in dataset_info.json."""
    tags = found.get("tags", {})
    pairs = {OTHER_NAMES.get(key, key): value for key, value in found.items() if key != "tags" and value is not None}
    for keys, known, what in ((pairs, COLUMNS, "column"), (tags, TAGS, "tag")):
        for key in keys:
            if key not in known:
                raise ConfigError(f"{where}: no {what} is called {key}; there is "
                                  f"{', '.join((*known, *OTHER_NAMES) if what == 'column' else known)}.")
            if not isinstance(keys[key], str):
                raise ConfigError(f"{where}: {key} must be given a name, not a {type(keys[key]).__name__}.")
    return KeyMap(pairs, dict(tags))
