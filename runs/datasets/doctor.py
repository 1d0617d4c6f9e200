"""`python -m runs.datasets.doctor`: checks one file and writes its rows and a report; see `checking.run`.

It runs in a process of its own, because parsers written in C and Rust read a stranger's file here: it
limits its own memory, and whoever started it limits its time. Progress goes to stdout as JSON lines.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import orjson

from runs.datasets.examination import Examination, wrapped_rows
from runs.datasets.problems import FileRefused, Problem
from runs.datasets.report import Outcome, Report, Warned
from runs.datasets.rows import RowWriter
from runs.datasets.suggestions import sample_of

_PROGRESS_S: Final = 0.25
_EMPTY_CODES: Final = ("empty_messages", "empty_content", "null_content")
_WARNINGS: Final = {
    "unanswered_end": "conversations end with a message that is not the assistant's; it is not trained on",
    "content_parts": "contents given as a list of texts were joined",
    "unused_message_keys": "messages have keys that are not used (only role, content, name, tool_calls, tool_call_id, and weight "
    "of the assistant's)",
    "replacement_characters": "texts hold the sign U+FFFD: letters were lost before the file was uploaded",
    "mojibake": "texts look as if UTF-8 had been read as Windows-1252 and saved again",
}
_PARAGRAPHS: Final = "plain text: each paragraph, up to a blank line or 16,384 characters, became one row"
_ANSWERS: Final = (
    "read as prompts with a reference answer, which supervised training cannot use; map the columns to "
    "prompt and completion to train on the answers"
)


class _Told:
    """Prints how far the examination is, at most four times a second."""

    def __init__(self, examination: Examination) -> None:
        self._examination = examination
        self._last = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last >= _PROGRESS_S:
            self._last = now
            self.tell()

    def tell(self) -> None:
        one = self._examination
        read = one.source.num_read / max(1, one.source.size_bytes) if one.source else 0.0
        line = {
            "share": min(read, 1.0),
            "num_rows": one.statistics.num_rows,
            "num_problems": one.problems.num_bad_rows,
        }
        sys.stdout.buffer.write(orjson.dumps(line) + b"\n")
        sys.stdout.buffer.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the file named by the arguments and write report.json."""
    options = _parser().parse_args(arguments)
    if options.memory_mb:
        _limit_memory(options.memory_mb * 2**20)
    examination = Examination(
        path=options.input,
        filename=options.filename,
        output=options.output,
        mapping=orjson.loads(options.mapping),
        encoding=options.encoding,
    )
    tokenizers = {name: Path(path) for name, _, path in (one.partition("=") for one in options.tokenizer)}
    report = _examined(examination, tokenizers, skip_bad=options.skip_bad)
    part = options.output / "report.json.part"
    part.write_bytes(orjson.dumps(report.as_dict(), option=orjson.OPT_INDENT_2))
    part.replace(options.output / "report.json")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runs.datasets.doctor", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="the file to check")
    parser.add_argument("--filename", required=True, help="its name when it was uploaded")
    parser.add_argument("--output", type=Path, required=True, help="folder for rows and report")
    parser.add_argument("--mapping", default="{}", help="JSON object: part to column")
    parser.add_argument("--encoding", default="", help="convert from this instead of UTF-8")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out")
    parser.add_argument("--tokenizer", action="append", default=[], help="NAME=PATH of a tokenizer.json")
    parser.add_argument("--memory-mb", type=int, default=0, help="limit of its own memory")
    return parser


def _limit_memory(size_bytes: int) -> None:
    """Limit what the process may allocate; unlike RLIMIT_AS this leaves mapped libraries out."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (size_bytes, size_bytes))


def _examined(one: Examination, tokenizers: dict[str, Path], *, skip_bad: bool) -> Report:
    told = _Told(one)
    try:
        rows = one.examine(told, tokenizers)
        if one.needs_mapping and (refusal := wrapped_rows(one.first_rows)):
            raise refusal
    except FileRefused as error:
        _drop_parts(one.output)
        one.needs_mapping = error.problem.code == "bad_mapping"
        outcome = Outcome.NEEDS_MAPPING if one.needs_mapping else Outcome.FAILED
        return _report(one, outcome, str(error), error.problem.fix, fatal=error.problem)
    told.tell()
    outcome, reason, fix = _outcome(one, skip_bad=skip_bad)
    _settle(rows, outcome)
    return _report(one, outcome, reason, fix)


def _drop_parts(output: Path) -> None:
    for path in output.glob("rows.*.part"):
        path.unlink()


def _settle(rows: RowWriter | None, outcome: Outcome) -> None:
    if rows is not None and outcome is Outcome.READY:
        rows.keep()
    elif rows is not None:
        rows.drop()


def _outcome(one: Examination, *, skip_bad: bool) -> tuple[Outcome, str, str]:
    """Return what happens next, why, and what to do."""
    num_good, num_bad = one.statistics.num_rows, one.problems.num_bad_rows
    if one.needs_mapping:
        names = ", ".join(one.columns[:20])
        fix = "say which column holds the prompt and which the completion (or the messages, or the text)"
        return Outcome.NEEDS_MAPPING, f"the columns are not known: {names}"[:400], fix
    if not num_good and not num_bad:
        return Outcome.FAILED, "the file holds no rows", "upload a file with at least one row"
    first = one.problems.first[0] if one.problems.first else None
    if first and not num_good:
        return Outcome.FAILED, f"none of the {num_bad:,} rows can be used; {first}", first.fix
    if first and not skip_bad:
        reason = f"{num_bad:,} of {num_good + num_bad:,} rows cannot be used; {first}"
        separator = "" if first.fix.endswith("?") else ";"
        return (
            Outcome.NEEDS_CHOICE,
            reason,
            f"{first.fix}{separator} or go on with the {num_good:,} good rows",
        )
    return Outcome.READY, "", ""


def _report(one: Examination, outcome: Outcome, error: str, fix: str, fatal: Problem | None = None) -> Report:
    statistics, problems = one.statistics, one.problems
    num_duplicates, is_estimated = statistics.duplicates()
    first = [*([fatal] if fatal else []), *problems.first]
    # Where other rows hold UTF-8 beyond ASCII, converting the file would garble those.
    guessed = next((problem.encoding for problem in first if problem.encoding and statistics.is_ascii), "")
    return Report(
        outcome=outcome,
        error=error,
        fix=fix,
        container=one.container,
        compression=one.source.compression if one.source else "",
        encoding=one.encoding or guessed or ("" if one.container == "parquet" else "utf-8"),
        columns=one.columns,
        mapping=dict(one.mapping),
        suggested_mapping=one.suggestion(),
        sample=sample_of(one.first_rows),
        num_rows=statistics.num_rows,
        num_bad_rows=problems.num_bad_rows,
        num_bad_rows_written=problems.num_written,
        num_duplicates=num_duplicates,
        are_duplicates_estimated=is_estimated,
        num_empty=sum(problems.counts[code] for code in _EMPTY_CODES),
        characters=statistics.characters(),
        tokens=one.tokens,
        roles=dict(statistics.roles),
        warnings=_warnings(one),
        problems=first[:100],
        problem_counts=dict(problems.counts),
        **_layout(one),
    )


def _layout(one: Examination) -> dict[str, Any]:
    if one.plan is None:
        return {}
    used = set(one.plan.columns.values())
    unused = [name for name in one.columns if name not in used]
    return {"format": one.plan.format, "kind": one.plan.kind, "unused_columns": unused}


def _warnings(one: Examination) -> list[Warned]:
    warnings = [
        Warned(code=code, text=_WARNINGS[code], count=count, line=line)
        for code, (count, line) in one.noted.items()
    ]
    if one.container == "text" and one.statistics.num_rows:
        warnings.append(Warned(code="paragraphs", text=_PARAGRAPHS, count=one.statistics.num_rows, line=None))
    if one.plan is not None and one.plan.format == "prompts" and not one.mapping:
        warnings.append(
            Warned(code="reference_answers", text=_ANSWERS, count=one.statistics.num_rows, line=None)
        )
    return warnings


if __name__ == "__main__":
    main()
