"""What is wrong with a file or one of its rows: where, why, and what to do about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from runs.exceptions import RequestInvalid

NUM_KEPT: Final = 100
_VALUE_CHARS: Final = 80
_ROW_CHARS: Final = 4_000
_MAX_BAD_BYTES: Final = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Args:
        line: line of the file (row of a Parquet file), from 1; None where no line is to blame.
        column: character of the line (or of the named field), from 1; None where unknown.
        field: the value to blame, such as `messages[2].role`; empty for the whole row.
        excerpt: the raw text around the place, for a row that could not be read.
        encoding: what the text seems to be written in, where it is not UTF-8.
    """

    code: str
    reason: str
    fix: str
    line: int | None = None
    column: int | None = None
    field: str = ""
    excerpt: str = ""
    encoding: str = ""

    def at(self, line: int) -> Problem:
        """Return the same problem on this line."""
        return self if self.line == line else replace(self, line=line)

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        line = f"line {self.line}{column}" if self.line else ""
        return ": ".join(part for part in (line, self.field, self.reason) if part)


class FileRefused(RequestInvalid):
    """the file cannot be read"""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))

    def __reduce__(self) -> tuple[object, ...]:
        return (FileRefused, (self.problem,))


class RowRefused(RequestInvalid):
    """a row cannot be used; only `formats` raises it, and `doctor` counts it"""

    def __init__(self, code: str, reason: str, fix: str, *, field: str = "") -> None:
        self.problem = Problem(code=code, reason=reason, fix=fix, field=field)
        super().__init__(reason, place=field)

    def __reduce__(self) -> tuple[object, ...]:
        problem = self.problem
        return (_rebuild_row, (problem.code, problem.reason, problem.fix, problem.field))


def _rebuild_row(code: str, reason: str, fix: str, field: str) -> RowRefused:
    return RowRefused(code, reason, fix, field=field)


def quoted(value: object) -> str:
    """Return a value as it is named in a reason: quoted, on one line, at most 80 characters."""
    text = repr(value[: _VALUE_CHARS * 2]) if isinstance(value, str) else repr(value)
    return text if len(text) <= _VALUE_CHARS else text[: _VALUE_CHARS - 3] + "..."


def excerpt_of(text: str, position: int) -> str:
    """Return the part of a line around a position, at most 160 characters."""
    start = max(0, position - _VALUE_CHARS)
    end = position + _VALUE_CHARS
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")


@dataclass(kw_only=True)
class ProblemLog:
    """The first problems, how often each code came, and the file with all the bad rows.

    Args:
        path: one JSON object a line, the problem and `row`; writing stops at 64 MiB, counting goes on.
    """

    path: Path
    first: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    num_written: int = 0
    _size_bytes: int = 0
    _file: BinaryIO | None = None

    @property
    def num_bad_rows(self) -> int:
        """How many rows were refused."""
        return self.counts.total()

    def add(self, problem: Problem, row: object = None) -> None:
        """Count a bad row and write it down."""
        self.counts[problem.code] += 1
        if len(self.first) < NUM_KEPT:
            self.first.append(problem)
        if self._size_bytes < _MAX_BAD_BYTES:
            self._write(problem, row)

    def close(self) -> None:
        """Finish the file; it exists only if there was a bad row."""
        if self._file is not None:
            self._file.close()

    def _write(self, problem: Problem, row: object) -> None:
        if self._file is None:
            self._file = self.path.open("wb")
        line = orjson.dumps(asdict(problem) | {"row": _shown(row)}) + b"\n"
        self._file.write(line)
        self._size_bytes += len(line)
        self.num_written += 1


def _shown(row: object) -> object:
    """Return a row as it can be written down: itself when small, else the beginning of its text."""
    if row is None:
        return None
    try:
        text = orjson.dumps(row, default=str)
    except (TypeError, RecursionError):
        return repr(row)[:_ROW_CHARS].encode("utf-8", "replace").decode()
    return orjson.Fragment(text) if len(text) <= _ROW_CHARS else text[:_ROW_CHARS].decode("utf-8", "replace")
