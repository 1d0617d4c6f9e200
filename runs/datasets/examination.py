"""One pass over a file: every row is read, judged, written in its canonical form and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson

from runs.datasets import formats, lengths, parquet, suggestions
from runs.datasets.chats import kind_of
from runs.datasets.formats import Plan
from runs.datasets.problems import FileRefused, Problem, ProblemLog, RowRefused, quoted
from runs.datasets.readers import READERS, Reader, container_of
from runs.datasets.report import Lengths
from runs.datasets.rows import RowWriter
from runs.datasets.sources import Source, open_source
from runs.datasets.statistics import Statistics, text_of_row

_NUM_PEEKED: Final = 200
_NUM_KEPT: Final = 20
_MAX_PEEKED_BLOCKS: Final = 64
_MAX_COLUMNS: Final = 200
_NUL: Final = b"\\u0000"
# U+FFFD, and what an apostrophe in UTF-8 becomes when it is read as Windows-1252 and saved again.
_DAMAGE: Final = {"replacement_characters": b"\xef\xbf\xbd", "mojibake": "\u00e2\u20ac\u2122".encode()}


class _Enough(Exception):
    """the first rows were seen"""


@dataclass(kw_only=True)
class Examination:
    """What is known of a file so far.

    Args:
        plan: how its rows are laid out; None until a row is recognised.
        columns: of the first rows.
        noted: how often a note came, and the line where it came first.
    """

    path: Path
    filename: str
    output: Path
    mapping: Mapping[str, str] = field(default_factory=dict)
    encoding: str = ""
    source: Source | None = None
    container: str = ""
    plan: Plan | None = None
    columns: list[str] = field(default_factory=list)
    first_rows: list[Any] = field(default_factory=list)
    noted: dict[str, tuple[int, int]] = field(default_factory=dict)
    tokens: dict[str, Lengths] = field(default_factory=dict)
    needs_mapping: bool = False

    def __post_init__(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        self.statistics = Statistics()
        self.problems = ProblemLog(path=self.output / "bad.jsonl")
        self.problems.path.unlink(missing_ok=True)

    def examine(self, on_block: Callable[[], None], tokenizers: Mapping[str, Path]) -> RowWriter | None:
        """Read the file to its end and return the good rows; None if the columns are not known.

        Raises:
            FileRefused: the file as a whole cannot be read.
        """
        self.source = source = open_source(self.path, encoding=self.encoding)
        self.container = container_of(source, self.filename)
        self._look()
        if self.needs_mapping:
            return None
        rows = RowWriter(self.output)
        source.on_block = on_block
        try:
            self._read(source, rows)
        finally:
            rows.finish()
            self.problems.close()
        if rows.num_rows and not self.needs_mapping:
            for name, path in tokenizers.items():
                self.tokens[name] = lengths.estimate(rows, path, on_batch=on_block)
        return rows

    def _look(self) -> None:
        """Find out the columns and the layout from the first rows."""
        assert self.source is not None
        self.first_rows = [value for value in self._peek(self.source) if isinstance(value, dict)]
        names = dict.fromkeys(str(name) for row in self.first_rows for name in row)
        self.columns = list(names)[:_MAX_COLUMNS]
        if self.container == "parquet":
            self.columns = parquet.columns_of(self.source)[:_MAX_COLUMNS]
        if self.mapping:
            self.plan = formats.by_mapping(self.mapping, self.columns, self.first_rows)
        else:
            self.plan = formats.choose(self.first_rows)
        self.needs_mapping = self.plan is None and bool(self.first_rows)
        del self.first_rows[_NUM_KEPT:]

    def _peek(self, source: Source) -> Iterator[object]:
        num_blocks = 0

        def count() -> None:
            nonlocal num_blocks
            num_blocks += 1
            if num_blocks > _MAX_PEEKED_BLOCKS:
                raise _Enough

        source.on_block = count
        try:
            for number, (_, value) in enumerate(READERS[self.container](source)):
                if number >= _NUM_PEEKED:
                    return
                yield value
        except _Enough:
            return

    def _reader(self) -> Reader:
        if self.container == "parquet" and self.plan is not None:
            columns = list(self.plan.columns.values())
            # A dot in a name would be taken for a path into a nested column.
            if not any("." in name for name in columns):
                return partial(parquet.read_parquet, columns=columns)
        return READERS[self.container]

    def _read(self, source: Source, rows: RowWriter) -> None:
        for line, value in self._reader()(source):
            if value.__class__ is Problem:
                assert isinstance(value, Problem)
                self.problems.add(value)
                continue
            try:
                if self.plan is None and not self._recognise(value):
                    return
                assert self.plan is not None
                row = self.plan.canonical(value)
                raw = _dumped(row)
            except RowRefused as error:
                self.problems.add(error.problem.at(line), value)
                continue
            rows.add(raw)
            self.statistics.add(row, raw)
            if self.plan.notes.codes:
                self._note(self.plan.notes.codes, line)
            for code, sign in _DAMAGE.items():
                if sign in raw:
                    self._note([code], line)

    def _recognise(self, value: object) -> bool:
        """Choose the layout by a row that comes late, after rows that could not be read."""
        if not isinstance(value, dict):
            fix = 'write each row as an object, such as {"prompt": "...", "completion": "..."}'
            raise RowRefused("not_an_object", f"the row is {kind_of(value)}, {quoted(value)}", fix)
        self.plan = formats.choose([value])
        self.needs_mapping = self.plan is None
        self.columns = [str(name) for name in value][:_MAX_COLUMNS]
        self.first_rows = [value]
        return self.plan is not None

    def _note(self, codes: list[str], line: int) -> None:
        for code in codes:
            count, first = self.noted.get(code, (0, line))
            self.noted[code] = count + 1, first
        if self.plan is not None:
            self.plan.notes.codes = []

    def suggestion(self) -> dict[str, str]:
        """Return a mapping to start from."""
        return suggestions.suggest(self.first_rows) if self.needs_mapping else {}


def _dumped(row: dict[str, Any]) -> bytes:
    """Return a canonical row as JSON.

    Raises:
        RowRefused: it holds a NUL character, or a value that JSON does not know.
    """
    try:
        raw = orjson.dumps(row)
    except TypeError as error:
        fix = "use texts, numbers, lists and objects only"
        raise RowRefused("wrong_type", f"a value cannot be written as JSON: {error}", fix) from error
    if _NUL in raw and "\0" in text_of_row(row):
        field = _nul_field(row)
        raise RowRefused("nul_character", "a text holds a NUL character", "delete it", field=field)
    return raw


def _nul_field(row: dict[str, Any]) -> str:
    for index, message in enumerate(row.get("messages", ())):
        if "\0" in message["content"]:
            return f"messages[{index}].content"
    return next((name for name, value in row.items() if isinstance(value, str) and "\0" in value), "")


def wrapped_rows(rows: list[Any]) -> FileRefused | None:
    """Return the refusal of a file that is one object with the rows inside, None if it is not."""
    if len(rows) != 1 or not isinstance(rows[0], dict):
        return None
    for name, value in rows[0].items():
        if (
            isinstance(value, list)
            and value
            and isinstance(value[0], dict)
            and not {"role", "from"} & value[0].keys()
        ):
            reason = f"the file is one object whose column {quoted(name)} holds the rows"
            fix = f"write each row on a line of its own (`jq -c '.[\"{name}\"][]' old.json > new.jsonl`)"
            return FileRefused(Problem(code="wrapped_rows", reason=reason, fix=fix, line=1, field=str(name)))
    return None
