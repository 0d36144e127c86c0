"""What is done with a record before it is tokenized; chosen with --handler-name."""

import dataclasses
import json
from typing import Any

from modellink.config.errors import ConfigError
from modellink.data.batches import Batch, missing_column


@dataclasses.dataclass(frozen=True)
class GeneralPretrainHandler:
    """Plain text: every column in `--json-keys` becomes token files of its own.

    Attributes:
        keys: the columns.
    """

    keys: tuple[str, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the token files: PREFIX_<name>_document."""
        return self.keys

    def texts(self, batch: Batch) -> list[list[str]]:
        """For each output the text of every row; a missing value (null) is an empty text.

        Raises:
            ConfigError: a row that is no JSON object, lacks a column, or holds something else than text; names it.
        """
        rows = [self._row(batch, i) for i in range(len(batch.rows))]
        return [list(column) for column in zip(*rows)]

    def _row(self, batch: Batch, i: int) -> list[str]:
        row = batch.rows[i]
        values = row if isinstance(row, tuple) else self._parse(batch, i, row)
        return [self._text(batch, i, key, value) for key, value in zip(self.keys, values)]

    def _parse(self, batch: Batch, i: int, row: bytes) -> list[Any]:
        try:
            record = json.loads(row)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{batch.place(i)}: not UTF-8 text ({error.reason}); convert the file to UTF-8.") \
                from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{batch.place(i)}: broken JSON: {error.msg}; every line must be a JSON object, "
                              "or the whole file a list of them.") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{batch.place(i)}: a JSON {type(record).__name__} where an object is needed, "
                              f'as in {{"{self.keys[0]}": "..."}}.')
        for key in self.keys:
            if key not in record:
                raise missing_column(batch.place(i), key, record)
        return [record[key] for key in self.keys]

    def _text(self, batch: Batch, i: int, key: str, value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ConfigError(f"{batch.place(i)}: column {key!r} holds a {type(value).__name__} where text is needed; "
                              "name a text column with --json-keys.")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # half a character, as "\\ud83d" alone in JSON
            raise ConfigError(f"{batch.place(i)}: column {key!r} holds half a character ({error.reason}); "
                              "mend or remove this record.") from error
        return value


HANDLERS = {"GeneralPretrainHandler": GeneralPretrainHandler}


def make_handler(name: str, keys: tuple[str, ...]) -> GeneralPretrainHandler:
    """The handler called `name`."""
    if name not in HANDLERS:
        raise ConfigError(f"--handler-name {name}: no such handler; there is {', '.join(HANDLERS)}.")
    return HANDLERS[name](keys)
