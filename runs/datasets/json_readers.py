"""Reads rows from JSON: one object a line, one array of objects, or objects written one after another.

Rows are (line, value) pairs; the value is a Problem where the row could not be read. An array is taken
apart while it streams, so its size does not matter; after a syntax error in it nothing more can be found.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Final

from runs.datasets import lines
from runs.datasets.encodings import not_utf8
from runs.datasets.json_errors import parse_line
from runs.datasets.problems import FileRefused, Problem, excerpt_of
from runs.datasets.sources import Source

_SPACE: Final = re.compile(r"[ \t\r\n]*")
# What may be left of a value at the end of a file that was cut off: nothing, or part of a word or number.
_UNFINISHED: Final = re.compile(r"[\w.+-]*\s*")
_DECODER: Final = json.JSONDecoder()
_TO_JSONL: Final = "correct it there, or convert the file to JSONL (`jq -c '.[]' old.json > new.jsonl`)"
_MAX_ROW: Final = lines.MAX_LINE_BYTES


def read_jsonl(source: Source) -> Iterator[tuple[int, object]]:
    """Yield the value of each line that is not blank."""
    number, held = 0, None
    for number, raw in lines.numbered_lines(source):
        # One line is held back: only the last can be cut off.
        if held is not None and (value := _value(held, number - 1)) is not None:
            yield number - 1, value
        held = raw
    if held is not None and (value := _value(held, number, is_last=True)) is not None:
        yield number, value


def _value(raw: bytes | Problem, line: int, *, is_last: bool = False) -> object:
    return raw if isinstance(raw, Problem) else parse_line(raw, line, is_last=is_last)


def read_json(source: Source) -> Iterator[tuple[int, object]]:
    """Yield the elements of an array, or the values that follow each other."""
    text = _Text(source)
    is_array = text.peek() == "["
    if is_array:
        text.skip(1)
    while (character := text.peek()) and character != "]":
        line = text.line
        try:
            raw = text.take_value()
        except _Truncated as cut:
            yield line, cut.problem
            return
        yield line, parse_line(raw.encode("utf-8", "surrogatepass"), line)
        if is_array and not text.take_comma():
            break
    yield from _end(text, is_array=is_array)


def _end(text: _Text, *, is_array: bool) -> Iterator[tuple[int, object]]:
    character = text.peek()
    if not is_array and not character:
        return
    if not character:
        yield (
            text.line,
            text.problem("truncated_array", "the array is not closed: the file was cut off", _CUT),
        )
        return
    if character == "]" and is_array:
        text.skip(1)
        character = text.peek()
    if character:
        wanted = "a comma or ]" if is_array else "a row"
        raise FileRefused(text.problem("not_json", f"{character!r} stands where {wanted} should", _TO_JSONL))


_CUT: Final = "export or upload it again, or go on with the rows before"


class _Truncated(Exception):
    """The text ends inside a value."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.reason)


class _Text:
    """The part of the text that is being looked at, and where it stands in the file."""

    def __init__(self, source: Source) -> None:
        self.line = 1
        self._column = 0
        self._blocks = source.blocks()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._position = 0
        self._is_done = False

    def peek(self) -> str:
        """Return the next character that is not a space, "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._position)
            assert match is not None
            self._advance(match.end())
            if self._position < len(self._text) or self._is_done:
                return self._text[self._position : self._position + 1]
            self._refill(1)

    def skip(self, count: int) -> None:
        self._advance(self._position + count)

    def take_comma(self) -> bool:
        """Step over a comma; False if the array ends here instead."""
        if self.peek() != ",":
            return False
        self.skip(1)
        if self.peek() == "]":
            raise FileRefused(self.problem("trailing_comma", "a comma stands before the `]`", _TO_JSONL))
        return True

    def take_value(self) -> str:
        """Return the text of the value that starts here."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                self._need_more(error)
            except RecursionError as error:
                reason = "the row is nested too deeply"
                raise FileRefused(self.problem("too_deep", reason, "flatten the row")) from error
            else:
                # A number at the end of the text may go on in the next block.
                if end < len(self._text) or self._is_done:
                    break
                self._refill(1)
        raw = self._text[self._position : end]
        self._advance(end)
        return raw

    def problem(self, code: str, reason: str, fix: str, *, offset: int = 0) -> Problem:
        """Return a problem at this place."""
        at = self._position + offset
        line = self.line + self._text.count("\n", self._position, at)
        start = self._text.rfind("\n", 0, at) + 1
        column = at - start + 1 + (0 if start else self._column)
        excerpt = excerpt_of(self._text[max(0, at - 200) : at + 200], min(at, 200))
        return Problem(code=code, reason=reason, fix=fix, line=line, column=column, excerpt=excerpt)

    def _need_more(self, error: json.JSONDecodeError) -> None:
        """Read on if the value may simply not be complete yet."""
        size = len(self._text) - self._position
        is_open = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
        offset = error.pos - self._position
        if self._is_done:
            is_open = (
                error.msg.startswith("Unterminated")
                or _UNFINISHED.fullmatch(self._text, error.pos) is not None
            )
        if self._is_done and is_open:
            reason = "the file ends in the middle of a row"
            raise _Truncated(self.problem("truncated_array", reason, _CUT, offset=offset))
        if not is_open:
            raise FileRefused(self.problem("not_json", error.msg.lower(), _TO_JSONL, offset=offset))
        if size > _MAX_ROW:
            reason = f"a row is longer than {_MAX_ROW // 2**20} MiB"
            fix = "write each row as an element of its own, and cut very long texts"
            raise FileRefused(self.problem("line_too_long", reason, fix))
        self._refill(max(size, 1))

    def _refill(self, count: int) -> None:
        """Read at least this many more characters, and forget what was used."""
        cut = self._text.rfind("\n", 0, self._position) + 1
        self._column = self._position - cut + (0 if cut else self._column)
        parts = [self._text[self._position :]]
        self._position = 0
        while count > 0 and not self._is_done:
            block = next(self._blocks, None)
            self._is_done = block is None
            parts.append(self._decoded(block or b""))
            count -= len(parts[-1])
        self._text = "".join(parts)

    def _decoded(self, block: bytes) -> str:
        try:
            return self._decoder.decode(block, self._is_done)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._position)
            line += error.object[: error.start].count(b"\n")
            start = error.object.rfind(b"\n", 0, error.start) + 1
            raw = error.object[start : error.start + 4096]
            moved = UnicodeDecodeError(
                "utf-8", raw, error.start - start, error.start - start + 1, error.reason
            )
            raise FileRefused(not_utf8(raw, moved, line)) from error

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position
