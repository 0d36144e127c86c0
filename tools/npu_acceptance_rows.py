"""Rows of the acceptance report, and why there is none for what broke."""

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modellink.config.errors import ConfigError
from modellink.launch.report import SENTENCE, TRACEBACK, exception_words, own_error

SHOWN = 100  # characters of a failure in the table; the report has all


@dataclass(frozen=True)
class Failure:
    """Why something gave no result.

    Attributes:
        exception: its type; without one how the process ended.
        message: of the exception; without one the end of the log.
        traceback: text, empty where there is none.
        log: file, empty where nothing was logged.
    """

    exception: str
    message: str
    traceback: str = ""
    log: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Of an exception of this process, or of one that a process pool has brought."""
        if isinstance(error, RunFailed):
            return error.failure
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)).strip())

    @classmethod
    def of_process(cls, how: str, log: Path) -> "Failure":
        """Of a process that ended in this way (an exit code, a signal) and left this log."""
        text = own_error(log)
        if text.startswith(SENTENCE):
            return cls(ConfigError.__name__, text.replace(SENTENCE, ""), log=str(log))
        if not text.startswith(TRACEBACK):
            return cls(how, text, log=str(log))
        name, _, message = exception_words(text).partition(": ")  # the last exception of a chain counts
        return cls(name.rpartition(".")[2], message, text, str(log))

    def __str__(self) -> str:
        return f"{self.exception}: {self.message}".split("\n")[0][:SHOWN].rstrip(": ")


class RunFailed(Exception):
    """A process that was started for a part has failed."""

    def __init__(self, failure: Failure):
        super().__init__(failure)
        self.failure = failure


@dataclass(frozen=True)
class Row:
    """One result; it passes when `value` does not exceed `limit`, and a row without a limit only reports.

    Attributes:
        failure: set where something broke, so that there is no result.
    """

    part: str
    case: str
    value: float | None
    unit: str
    limit: float | None = None
    failure: Failure | None = None

    @classmethod
    def broken(cls, part: str, case: str, failure: Failure) -> "Row":
        return cls(part, f"{case}: {failure}", None, "", failure=failure)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Row":
        failure = values.pop("failure")
        return cls(**values, failure=Failure(**failure) if failure is not None else None)

    @property
    def verdict(self) -> str:
        if self.failure is not None:
            return "FAILED"
        if self.limit is None:
            return "-"
        return "pass" if self.value is not None and self.value <= self.limit else "FAIL"
