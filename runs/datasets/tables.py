"""Reads rows from CSV and TSV; the delimiter is found by looking at the first lines.

A quote that is never closed would swallow the rest of the file: such a row is given up at its own line,
and reading goes on with the line after it.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from typing import Final

from runs.datasets import lines
from runs.datasets.encodings import not_utf8
from runs.datasets.problems import FileRefused, Problem, excerpt_of, quoted
from runs.datasets.sources import Source

DELIMITERS: Final = ",;\t|"
_NAMES: Final = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_MAX_ROW_LINES: Final = 2_000
_MAX_HEADER_CHARS: Final = 100
_NUM_SAMPLED: Final = 20


def find_delimiter(head: bytes) -> str:
    """Return the delimiter that gives the first rows the same number of columns, "" if none gives two."""
    text = head.decode("utf-8", "replace")
    if len(head) > 60_000:
        text = text[: text.rfind("\n") + 1]
    scores = {one: _score(text, one) for one in DELIMITERS}
    best = max(scores, key=lambda one: scores[one])
    return best if scores[best] > 0 else ""


def _score(text: str, delimiter: str) -> float:
    """Return the share of rows as wide as the first, a little more for wider rows; 0 for one column."""
    rows = []
    try:
        for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter):
            rows.append(row) if row else None
            if len(rows) > _NUM_SAMPLED:
                break
    except csv.Error:
        pass
    if not rows or len(rows[0]) < 2:
        return 0.0
    width = len(rows[0])
    return sum(len(row) == width for row in rows) / len(rows) + min(width, 50) / 1000


def read_table(source: Source) -> Iterator[tuple[int, object]]:
    """Yield a dict of texts for each row after the header.

    Raises:
        FileRefused: the header is missing, or names a column twice.
    """
    csv.field_size_limit(lines.MAX_LINE_BYTES)
    feed = _Feed(source)
    delimiter = find_delimiter(source.head) or ","
    header: list[str] | None = None
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        feed.start_row()
        try:
            row = next(reader, None)
        except (csv.Error, _RowTooLong) as error:
            problem = feed.give_up(error, delimiter)
            if header is None:
                raise FileRefused(problem) from error
            reader = csv.reader(feed, delimiter=delimiter, strict=True)
            yield problem.line or 0, problem
            continue
        if row is None:
            return
        if header is None and row:
            header = _header(row, feed)
        elif row and header is not None:
            yield feed.first_line, feed.problem or _row(header, row, feed.first_line, delimiter)


def _row(header: list[str], row: list[str], line: int, delimiter: str) -> object:
    if len(row) == len(header):
        return dict(zip(header, row, strict=True))
    fields = "field" if len(row) == 1 else "fields"
    return Problem(
        code="ragged_row",
        reason=f"the row has {len(row)} {fields}, the header {len(header)} (delimiter: {_NAMES[delimiter]})",
        fix=f"put fields that contain a {_NAMES[delimiter]} in double quotes, and add missing fields",
        line=line,
        excerpt=excerpt_of(delimiter.join(row), 0),
    )


def _header(row: list[str], feed: _Feed) -> list[str]:
    """Return the names of the columns; one without a name (an index of pandas) is called by its place."""
    if feed.problem:
        raise FileRefused(feed.problem)
    names = [name.strip() for name in row]
    for place, name in enumerate(names, 1):
        if len(name) > _MAX_HEADER_CHARS or "\n" in name:
            reason = (
                f"column {place} of the header is a text, {quoted(name)}: the header line seems to be missing"
            )
            raise FileRefused(
                _in_header("missing_header", reason, "add a first line such as prompt,completion")
            )
        if name and name in names[: place - 1]:
            reason = f"two columns of the header are called {quoted(name)}"
            fix = "give each column a name of its own; if this is no header, add one as the first line"
            raise FileRefused(_in_header("duplicate_column", reason, fix, column=place))
    return [name or f"column {place}" for place, name in enumerate(names, 1)]


def _in_header(code: str, reason: str, fix: str, *, column: int = 1) -> Problem:
    return Problem(code=code, reason=reason, fix=fix, line=1, column=column)


class _RowTooLong(Exception):
    """one row goes on for too long"""


class _Feed:
    """Gives the csv module one line after the other and remembers those of the row being read."""

    def __init__(self, source: Source) -> None:
        self.first_line = 0
        self.problem: Problem | None = None
        self._lines = lines.numbered_lines(source)
        self._next_line = 1
        self._row: list[str] = []
        self._size = 0
        self._again: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = self._again.popleft() if self._again else self._read()
        self._next_line += 1
        self._row.append(text)
        self._size += len(text)
        if len(self._row) > _MAX_ROW_LINES or self._size > lines.MAX_LINE_BYTES:
            raise _RowTooLong
        return text

    def start_row(self) -> None:
        """Note that the next line begins a row."""
        self.first_line = self._next_line
        self.problem = None
        self._row = []
        self._size = 0

    def give_up(self, error: Exception, delimiter: str) -> Problem:
        """Return the problem of the row being read, and go back to the line after its first."""
        first = self._row[0]
        last_line = self._next_line - 1
        self._again.extendleft(reversed(self._row[1:]))
        self._next_line = self.first_line + 1
        if self.problem:
            return self.problem
        column = _open_quote(first, delimiter)
        until = f" (looked for it up to line {last_line})" if last_line > self.first_line else ""
        detail = "" if isinstance(error, _RowTooLong) else f": {error}"
        return Problem(
            code="unbalanced_quotes",
            reason=f"a double quote is not closed where it should be{until}{detail}",
            fix='close the quote, and write a quote inside a field twice ("")',
            line=self.first_line,
            column=column,
            excerpt=excerpt_of(first, column - 1),
        )

    def _read(self) -> str:
        number, raw = next(self._lines)
        if isinstance(raw, Problem):
            self.problem = raw
            return "\n"
        try:
            return raw.decode() + "\n"
        except UnicodeDecodeError as error:
            self.problem = not_utf8(raw, error, number)
            return raw.decode("utf-8", "replace") + "\n"


def _open_quote(line: str, delimiter: str) -> int:
    """Return the column of the last quote that opens a field."""
    return max(line.rfind(f'{delimiter}"') + 2, 1)
