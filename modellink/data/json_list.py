"""The records of a file that is one JSON list, cut out one by one: the list may be larger than memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from modellink.config.errors import ConfigError
from modellink.data.batches import not_utf8

READ_CHARACTERS = 1 << 20


class _Cursor:
    """A place in a JSON text that is read piece by piece; knows its line."""

    def __init__(self, handle: TextIO, path: Path):
        self.handle = handle
        self.path = path
        self.text = ""
        self.at = 0
        self.line = 1
        self.decoder = json.JSONDecoder()

    def _grow(self) -> bool:
        """Drop what is behind and read more; what is read doubles, so a long record is scanned few times."""
        rest = self.text[self.at:]
        try:
            more = self.handle.read(max(READ_CHARACTERS, len(rest)))
        except UnicodeDecodeError as error:
            raise not_utf8(str(self.path), error) from error
        self.text, self.at = rest + more, 0
        return bool(more)

    def _broken(self, reason: str, line: int) -> ConfigError:
        return ConfigError(f"{self.path}, line {line}: broken JSON: {reason}; mend or remove this record.")

    def peek(self) -> str:
        """The next character that is no white space, or an empty string at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.line += self.text[self.at] == "\n"
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def take(self, allowed: str) -> str:
        """Read one of the marks `allowed`."""
        mark = self.peek()
        if not mark or mark not in allowed:
            found = repr(mark) if mark else "the end of the file"
            raise self._broken(f"expected {' or '.join(allowed)} and found {found}", self.line)
        self.at += 1
        return mark

    def value(self) -> tuple[int, bytes]:
        """(line, text) of the next record."""
        self.peek()
        while True:
            try:
                _, end = self.decoder.raw_decode(self.text, self.at)
                break
            except json.JSONDecodeError as error:
                line = self.line + self.text.count("\n", self.at, error.pos)
                if not self._grow():  # not just cut off by the piece in hand
                    raise self._broken(error.msg, line) from error
        line, record = self.line, self.text[self.at:end]
        self.line += record.count("\n")
        self.at = end
        return line, record.encode("utf-8")


def records(handle: TextIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(line, JSON text) of every record of the list.

    Raises:
        ConfigError: the file is no whole JSON list; names the line.
    """
    cursor = _Cursor(handle, path)
    cursor.take("[")
    if cursor.peek() == "]":
        return
    while True:
        yield cursor.value()
        if cursor.take(",]") == "]":
            return
