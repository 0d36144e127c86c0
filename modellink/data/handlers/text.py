"""Handlers of pretraining text: a record becomes one text for each output."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from modellink.data.batches import Batch, missing_column
from modellink.data.handlers.records import KeyMap, parse_row, text_of
from modellink.data.readers import ARTICLES


@dataclasses.dataclass(frozen=True)
class GeneralPretrainHandler:
    """Plain text: every column in `--json-keys` becomes token files of its own.

    Attributes:
        keys: the columns.
    """

    keys: tuple[str, ...]

    ends_documents: ClassVar[bool] = False
    text_format: ClassVar[str | None] = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the token files: PREFIX_<name>_document."""
        return self.keys

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Columns that readers take; None: all."""
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
        values = row if isinstance(row, tuple) else self._values(batch, i)
        return [text_of(batch.place(i), key, value) for key, value in zip(self.keys, values)]

    def _values(self, batch: Batch, i: int) -> list[Any]:
        record = parse_row(batch, i, self.keys[0])
        for key in self.keys:
            if key not in record:
                raise missing_column(batch.place(i), key, record)
        return [record[key] for key in self.keys]


@dataclasses.dataclass(frozen=True)
class WikiTextPretrainHandler(GeneralPretrainHandler):
    """WikiText: documents begin at ` = Title = ` lines, and each is ended with the end-of-document token."""

    ends_documents: ClassVar[bool] = True
    text_format: ClassVar[str | None] = ARTICLES


@dataclasses.dataclass(frozen=True)
class WrittenPretrainHandler(ABC):
    """Text composed of several columns.

    Attributes:
        key_map: names in the file.
    """

    key_map: KeyMap = KeyMap()

    outputs = ("text",)
    columns = None
    ends_documents = False
    text_format = None

    def texts(self, batch: Batch) -> list[list[str]]:
        """As GeneralPretrainHandler's, for one output."""
        return [[self.compose(batch.place(i), parse_row(batch, i)) for i in range(len(batch.rows))]]

    @abstractmethod
    def compose(self, place: str, record: dict[str, Any]) -> str:
        """The text of a record."""


class AlpacaPretrainHandler(WrittenPretrainHandler):
    """Alpaca records in the one chat form of ModelLink."""

    def compose(self, place: str, record: dict[str, Any]) -> str:
        instruction, output = (self.key_map.text(place, record, name) for name in ("instruction", "output"))
        given = self.key_map.text(place, record, "input", needed=False)
        return ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a "
                "task. Write a response that appropriately completes the request.\n\n### Instruction:\n"
                f"{instruction}\n\n{f'### Input:{chr(10)}{given}{chr(10) * 2}' if given else ''}"
                f"### Response: ASSISTANT: {output}")


class StackOverflowPythonPretrainHandler(WrittenPretrainHandler):
    """Questions about Python with one answer."""

    def compose(self, place: str, record: dict[str, Any]) -> str:
        title, question, answer = (self.key_map.text(place, record, name)
                                   for name in ("title", "question_body", "answer_body"))
        return f"In python, {title}\n### Question:\n{question}\n### Response:\n{answer}\n"


TextHandler = GeneralPretrainHandler | WrittenPretrainHandler
