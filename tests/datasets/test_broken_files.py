"""Every kind of broken file is answered with the line, the column where there is one, the reason and a fix."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from runs.datasets.report import Outcome, Report
from tests.datasets.conftest import Check, chat_line

GOOD = '{"prompt":"a","completion":"b"}\n'
CHAT = chat_line(("user", "a"), ("assistant", "b"))


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A broken file and what has to be said about it; `says` and `fix` are parts of the sentences."""

    name: str
    content: str | bytes
    code: str
    line: int | None
    column: int | None = None
    field: str = ""
    says: str
    fix: str
    filename: str = "rows.jsonl"


def _packed(make: Callable[[io.BytesIO], None]) -> bytes:
    stream = io.BytesIO()
    make(stream)
    return stream.getvalue()


def _zip(name: str) -> bytes:
    def write(stream: io.BytesIO) -> None:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(name, GOOD)

    return _packed(write)


def _tar(stream: io.BytesIO) -> None:
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("rows.jsonl")
        info.size = len(GOOD)
        archive.addfile(info, io.BytesIO(GOOD.encode()))


def _parquet(rows: dict[str, list[object]]) -> bytes:
    return _packed(lambda stream: pq.write_table(pa.table(rows), stream))


def _role(role: object, *, code: str, says: str, fix: str) -> Broken:
    """A second message with this role."""
    content = CHAT + chat_line(("user", "a"), (role, "b"))
    field = "messages[1].role"
    return Broken(name=f"role {role}", content=content, code=code, line=2, field=field, says=says, fix=fix)


def _content(
    content: object, *, code: str, says: str, fix: str, field: str = "messages[1].content"
) -> Broken:
    """An answer with this content."""
    text = CHAT + chat_line(("user", "a"), ("assistant", content))
    return Broken(
        name=f"content {content!r}", content=text, code=code, line=2, field=field, says=says, fix=fix
    )


PARQUET = _parquet({"prompt": ["a"] * 50, "completion": ["b"] * 50})
ZSTD = zstandard.compress(GOOD.encode() * 100)
JSONL = [
    Broken(name="truncated last line", content=GOOD + '{"prompt":"x","comp', code="truncated_last_line", line=2, column=20, says="ends in the middle", fix="cut off"),
    Broken(name="cut inside a letter", content=(GOOD + '{"prompt":"x\u00e9').encode()[:-1], code="truncated_last_line", line=2, column=1, says="last line", fix="cut off"),
    Broken(name="unfinished row", content='{"prompt":"x",\n' + GOOD, code="unfinished_row", line=1, column=15, says="ends in the middle", fix="one JSON object a line"),
    Broken(name="two objects", content=GOOD + GOOD.strip() + GOOD, code="two_objects", line=2, column=32, says="second JSON value", fix="one JSON object a line"),
    Broken(name="two with comma", content=GOOD + GOOD.strip() + "," + GOOD, code="two_objects", line=2, column=32, says="comma", fix="one JSON object a line"),
    Broken(name="comma after", content=GOOD + GOOD.strip() + ",\n" + GOOD, code="trailing_comma", line=2, column=32, says="comma follows", fix="end each line"),
    Broken(name="comma inside", content=GOOD + '{"prompt":"a","completion":"b",}\n', code="trailing_comma", line=2, column=31, says="closing bracket", fix="delete"),
    Broken(name="text after", content=GOOD + GOOD.strip() + " # note\n", code="trailing_text", line=2, column=33, says="# note", fix="end each line"),
    Broken(name="list on a line", content=GOOD + '["a","b"]\n', code="not_an_object", line=2, says="a list", fix="as an object"),
    Broken(name="text on a line", content=GOOD + '"a"\n', code="not_an_object", line=2, says="a text, 'a'", fix="as an object"),
    Broken(name="NaN", content=GOOD + '{"prompt":NaN,"completion":"b"}\n', code="not_a_number", line=2, column=11, says="NaN", fix="null"),
    Broken(name="Infinity", content=GOOD + '{"prompt":-Infinity}\n', code="not_a_number", line=2, column=12, says="-Infinity", fix="null"),
    Broken(name="huge number", content=GOOD + '{"prompt":1e999}\n', code="not_a_number", line=2, column=11, says="too large", fix="smaller"),
    Broken(name="lone surrogate", content=GOOD + '{"prompt":"\\ud83d","completion":"b"}\n', code="lone_surrogate", line=2, column=12, says="surrogate", fix="UTF-8"),
    Broken(name="NUL byte", content=GOOD + '{"prompt":"a\0b","completion":"b"}\n', code="nul_character", line=2, column=13, says="NUL", fix="damaged"),
    Broken(name="NUL escape", content=GOOD + '{"prompt":"a\\u0000","completion":"b"}\n', code="nul_character", line=2, field="prompt", says="NUL", fix="delete"),
    Broken(name="raw tab", content=GOOD + '{"prompt":"a\tb","completion":"b"}\n', code="control_character", line=2, column=13, says="'\\t'", fix="json.dumps"),
    Broken(name="Python dict", content=GOOD + "{'prompt':'a'}\n", code="single_quotes", line=2, column=2, says="single quotes", fix="double quotes"),
    Broken(name="Python None", content=GOOD + '{"prompt":None}\n', code="python_literal", line=2, column=11, says="None", fix="null"),
    Broken(name="no JSON", content=GOOD + "hello\n", code="not_json", line=2, column=1, says="'hello'", fix="one JSON object a line"),
    Broken(name="too deep", content=GOOD + "[" * 5000 + "\n", code="too_deep", line=2, column=1026, says="nested", fix="flatten"),
    Broken(name="long line", content=GOOD + '{"prompt":"' + "x" * (17 * 2**20) + '"}\n' + GOOD, code="line_too_long", line=2, column=1, says="17.0 MiB", fix="one row on each line"),
    Broken(name="wrapped", content='{"data":[{"prompt":"a","completion":"b"}]}', code="wrapped_rows", line=1, field="data", says="'data'", fix="jq"),
]  # fmt: skip
ENCODINGS = [
    Broken(name="UTF-16", content=GOOD.encode("utf-16"), code="not_utf8", line=1, column=1, says="UTF-16-LE", fix="iconv"),
    Broken(name="UTF-16 unmarked", content=GOOD.encode("utf-16-be"), code="not_utf8", line=1, column=1, says="UTF-16-BE", fix="iconv"),
    Broken(name="UTF-32", content=GOOD.encode("utf-32"), code="not_utf8", line=1, column=1, says="UTF-32-LE", fix="iconv"),
    Broken(name="GB18030", content=(GOOD + '{"prompt":"你好吗朋友","completion":"很好"}\n').encode("gb18030"), code="not_utf8", line=2, column=12, says="GB18030", fix="save the file as UTF-8"),
    Broken(name="Latin-1", content=(GOOD + '{"prompt":"Un café noir","completion":"oui"}\n').encode("latin-1"), code="not_utf8", line=2, column=18, says="0xE9 is not UTF-8; the line looks like LATIN-1", fix="save the file as UTF-8"),
    Broken(name="Windows-1252", content=(GOOD + '{"prompt":"It’s “so”","completion":"b"}\n').encode("cp1252"), code="not_utf8", line=2, column=14, says="CP1252", fix="save the file as UTF-8"),  # noqa: RUF001 - that is the test
    Broken(name="Cyrillic", content=(GOOD + '{"prompt":"Привет, как дела у вас","completion":"b"}\n').encode("cp1251"), code="not_utf8", line=2, column=12, says="CP1251", fix="save the file as UTF-8"),  # noqa: RUF001 - that is the test
    Broken(name="Shift-JIS", content=(GOOD + '{"prompt":"こんにちは世界","completion":"b"}\n').encode("shift_jis"), code="not_utf8", line=2, column=12, says="SHIFT_JIS", fix="save the file as UTF-8"),
    Broken(name="damage", content=GOOD.encode() + b'{"prompt":"a\xffb","completion":"b"}\n', code="not_utf8", line=2, column=13, says="0xFF", fix="mend or delete"),
    Broken(name="Latin-1 CSV", content="prompt,completion\na,b\nc,café\n".encode("latin-1"), code="not_utf8", line=3, column=6, says="LATIN-1", fix="save the file as UTF-8", filename="a.csv"),
    Broken(name="Latin-1 text", content="one\n\ncafé noir\n".encode("latin-1"), code="not_utf8", line=3, column=4, says="LATIN-1", fix="save the file as UTF-8", filename="a.txt"),
]  # fmt: skip
ARRAYS = [
    Broken(name="array cut off", content=f"[{GOOD},\n{{\"prompt\": \"x", code="truncated_array", line=3, column=12, says="ends in the middle", fix="rows before", filename="a.json"),
    Broken(name="array not closed", content=f"[{GOOD}", code="truncated_array", line=2, column=1, says="not closed", fix="rows before", filename="a.json"),
    Broken(name="array syntax", content=f'[{GOOD},\n{{"prompt": bad}}]', code="not_json", line=3, column=12, says="expecting value", fix="JSONL", filename="a.json"),
    Broken(name="array comma", content=f"[{GOOD},]", code="trailing_comma", line=2, column=2, says="comma", fix="JSONL", filename="a.json"),
    Broken(name="array no comma", content=f"[{GOOD}{GOOD}]", code="not_json", line=2, column=1, says="a comma or ]", fix="JSONL", filename="a.json"),
    Broken(name="array of texts", content='[{"text":"a"}, "b"]', code="not_an_object", line=1, says="'b'", fix="as an object", filename="a.json"),
    Broken(name="array Latin-1", content='[{"text":"a"},\n {"text":"café"}]'.encode("latin-1"), code="not_utf8", line=2, column=14, says="0xE9", fix="UTF-8", filename="a.json"),
]  # fmt: skip
CHATS = [
    _role("assitant", code="unknown_role", says="'assitant'", fix='did you mean "assistant"?'),
    _role("gpt", code="unknown_role", says="'gpt'", fix='did you mean "assistant"?'),
    _role("Assistant", code="unknown_role", says="'Assistant'", fix='did you mean "assistant"?'),
    _role("zebra", code="unknown_role", says="'zebra'", fix="use one of system"),
    _role(None, code="missing_role", says="no role", fix="system, user, assistant, tool"),
    _role(3, code="wrong_type", says="a number, 3", fix="one of system"),
    _role("user", code="role_order", says="'user' follows 'user'", fix="comes assistant"),
    _role("system", code="role_order", says="after the beginning", fix="put it first"),
    _content(None, code="null_content", says="null", fix="leave this row out"),
    _content(["x"], code="content_list", says="a part that is no text", fix="one text", field="messages[1].content[0]"),
    _content(
        [{"type": "image_url"}], code="content_list", says="image_url", fix="text", field="messages[1].content[0]"
    ),
    _content(3, code="wrong_type", says="a number, 3", fix="a text"),
    _content("", code="empty_content", says="empty", fix="leave this row out"),
    _content(" \n", code="empty_content", says="white space", fix="leave this row out"),
    Broken(name="no messages", content=CHAT + '{"messages":[]}\n', code="empty_messages", line=2, field="messages", says="empty", fix="leave this row out"),
    Broken(name="messages a text", content=CHAT + '{"messages":"x"}\n', code="wrong_type", line=2, field="messages", says="a text, 'x'", fix="list of messages"),
    Broken(name="message a text", content=CHAT + '{"messages":["x"]}\n', code="wrong_type", line=2, field="messages[0]", says="a text, 'x'", fix="role and content"),
    Broken(name="no assistant", content=CHAT + chat_line(("user", "a")), code="no_assistant", line=2, field="messages", says="no assistant", fix="add"),
    Broken(name="starts with assistant", content=CHAT + chat_line(("assistant", "a")), code="role_order", line=2, field="messages[0].role", says="starts with 'assistant'", fix="system or user"),
    Broken(name="tool without call", content=CHAT + chat_line(("user", "a"), ("assistant", "b"), ("tool", "c")), code="role_order", line=2, field="messages[2].role", says="called none", fix="tool_calls"),
    Broken(name="tool arguments", content=CHAT + json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{no"}}]}]}), code="tool_call", line=2, field="messages[1].tool_calls[0].arguments", says="'{no'", fix="as an object"),
    Broken(name="tools a text", content=CHAT + CHAT.replace("{", '{"tools":"x",', 1), code="wrong_type", line=2, field="tools", says="a text, 'x'", fix="JSON schemas"),
    Broken(name="ShareGPT role", content='{"conversations":[{"from":"humn","value":"a"}]}', code="unknown_role", line=1, field="conversations[0].from", says="'humn'", fix="use one of"),
]  # fmt: skip
COLUMNS = [
    Broken(name="misspelt column", content=GOOD + '{"promt":"a","completion":"b"}\n', code="missing_column", line=2, field="prompt", says="'promt'", fix='did you mean "prompt"'),
    Broken(name="mixed formats", content=GOOD + CHAT, code="mixed_formats", line=2, field="prompt", says="messages", fix="one format"),
    Broken(name="null completion", content=GOOD + '{"prompt":"a","completion":null}\n', code="null_content", line=2, field="completion", says="null", fix="leave this row out"),
    Broken(name="number completion", content=GOOD + '{"prompt":"a","completion":5}\n', code="wrong_type", line=2, field="completion", says="a number, 5", fix="as a text"),
    Broken(name="same answers", content='{"prompt":"a","chosen":"b","rejected":"b"}\n', code="same_answers", line=1, field="rejected", says="the same", fix="leave"),
    Broken(name="no prompt", content='{"chosen":"b","rejected":"c"}\n', code="missing_column", line=1, field="prompt", says="no prompt", fix="add a column prompt"),
]  # fmt: skip
TABLES = [
    Broken(name="open quote", content='prompt,completion\na,"b\nc,d\ne,f\n', code="unbalanced_quotes", line=2, column=3, says="not closed", fix="close the quote", filename="a.csv"),
    Broken(name="stray quote", content='prompt,completion\na,"b"x\nc,d\n', code="unbalanced_quotes", line=2, column=3, says="expected after", fix="twice", filename="a.csv"),
    Broken(name="ragged", content="prompt;completion\na;b\na;b;c\n", code="ragged_row", line=3, says="3 fields, the header 2 (delimiter: semicolon)", fix="double quotes", filename="a.csv"),
    Broken(name="short row", content="prompt\tcompletion\na\tb\nc\n", code="ragged_row", line=3, says="1 field,", fix="missing fields", filename="a.tsv"),
    Broken(name="duplicate header", content="prompt,prompt\na,b\n", code="duplicate_column", line=1, column=2, says="'prompt'", fix="name of its own", filename="a.csv"),
    Broken(name="no header", content="x" * 150 + ",b\nc,d\n", code="missing_header", line=1, column=1, says="missing", fix="first line", filename="a.csv"),
    Broken(name="empty cell", content="prompt,completion\na,\nc,d\n", code="empty_content", line=2, field="completion", says="empty", fix="leave", filename="a.csv"),
]  # fmt: skip
FILES = [
    Broken(name="empty", content=b"", code="empty_file", line=None, says="0 bytes", fix="at least one row"),
    Broken(name="binary", content=bytes(range(16)) * 40, code="binary", line=None, says="binary", fix="JSONL"),
    Broken(name="zip", content=_zip("rows.jsonl"), code="unsupported_kind", line=None, says="zip archive", fix="unpack"),
    Broken(name="xlsx", content=_zip("xl/workbook.xml"), code="unsupported_kind", line=None, says="Excel", fix="CSV"),
    Broken(name="tar", content=_packed(_tar), code="unsupported_kind", line=None, says="tar archive", fix="unpack"),
    Broken(name="tar.gz", content=gzip.compress(_packed(_tar)), code="unsupported_kind", line=None, says="tar archive", fix="unpack"),
    Broken(name="pdf", content=b"%PDF-1.7\n", code="unsupported_kind", line=None, says="PDF", fix=".txt"),
    Broken(name="pickle", content=pickle.dumps([{"a": 1}]), code="unsupported_kind", line=None, says="pickle", fix="JSONL"),
    Broken(name="Arrow", content=b"ARROW1\0\0", code="unsupported_kind", line=None, says="Arrow", fix="Parquet"),
    Broken(name="web page", content="<!DOCTYPE html><html>", code="unsupported_kind", line=None, says="web page", fix="download"),
    Broken(name="Git LFS", content="version https://git-lfs.github.com/spec/v1\n", code="unsupported_kind", line=None, says="Git LFS", fix="git lfs pull"),
    Broken(name="packed twice", content=gzip.compress(ZSTD), code="packed_twice", line=None, says="twice", fix="unpack"),
    Broken(name="gzip cut off", content=gzip.compress(GOOD.encode() * 100)[:-6], code="truncated_stream", line=None, says="cut off", fix="compare the sizes"),
    Broken(name="gzip damaged", content=gzip.compress(GOOD.encode())[:-6] + b"\0" * 6, code="damaged_stream", line=None, says="gzip stream is damaged", fix="compare the sizes"),
    Broken(name="zstd cut off", content=ZSTD[:-3], code="truncated_stream", line=None, says="cut off", fix="compare the sizes"),
    Broken(name="zstd damaged", content=ZSTD + b"junkjunk", code="damaged_stream", line=None, says="zstd stream is damaged", fix="compare the sizes"),
    Broken(name="Parquet cut off", content=PARQUET[:-9], code="truncated_file", line=None, says="no footer", fix="write it again"),
    Broken(name="Parquet damaged", content=PARQUET[:-40] + b"\xff" * 32 + PARQUET[-8:], code="damaged_file", line=None, says="damaged", fix="write it again"),
    Broken(name="Parquet encrypted", content=b"PARE" + b"\0" * 40 + b"PARE", code="encrypted", line=None, says="encrypted", fix="without encryption"),
    Broken(name="Parquet in gzip", content=gzip.compress(PARQUET), code="packed_parquet", line=None, says="inside gzip", fix="unpack"),
    Broken(name="Parquet number", content=_parquet({"prompt": ["a", "b"], "completion": [1, 2]}), code="wrong_type", line=1, field="completion", says="a number, 1", fix="as a text"),
]  # fmt: skip
BROKEN = [*JSONL, *ENCODINGS, *ARRAYS, *CHATS, *COLUMNS, *TABLES, *FILES]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda one: one.name)
def test_it_says_where_why_and_what_to_do(check: Check, output: Path, broken: Broken) -> None:
    report = check(broken.content, broken.filename)
    problem = report.problems[0]
    assert (problem.code, problem.line, problem.column, problem.field) == (
        broken.code,
        broken.line,
        broken.column,
        broken.field,
    )
    assert broken.says in problem.reason
    assert broken.fix in problem.fix
    assert problem.reason in report.error
    _assert_settled(report, output)


def _assert_settled(report: Report, output: Path) -> None:
    """A file with good rows waits for a choice, one without has failed; neither leaves rows behind."""
    assert report.outcome is (Outcome.NEEDS_CHOICE if report.num_rows else Outcome.FAILED)
    assert report.fix
    assert {path.name for path in output.iterdir()} <= {"report.json", "bad.jsonl"}


@pytest.mark.parametrize("filename", ["a.csv", "a.jsonl", "a.json", "a.txt", "a"])
@pytest.mark.parametrize("content", ["\n \n\n", " ", "\ufeff", "\r\n"])
def test_a_blank_file_fails(check: Check, content: str, filename: str) -> None:
    report = check(content, filename)
    assert (report.outcome, report.error) == (Outcome.FAILED, "the file holds no rows")


@pytest.mark.parametrize(("filename", "content"), [("a.csv", "prompt,completion\n"), ("a.json", "[\n]")])
def test_a_file_with_a_frame_only_fails(check: Check, content: str, filename: str) -> None:
    assert check(content, filename).outcome is Outcome.FAILED


def test_an_empty_parquet_file_fails(check: Check) -> None:
    report = check(_parquet({"prompt": [], "completion": []}), "a.parquet")
    assert (report.outcome, report.error) == (Outcome.FAILED, "the file holds no rows")
    assert report.columns == ["prompt", "completion"]


def test_bad_rows_are_all_written_down_and_the_first_hundred_reported(check: Check, output: Path) -> None:
    report = check(GOOD + '{"prompt":"a"}\n' * 250 + "no\n")
    assert (report.num_rows, report.num_bad_rows, report.num_bad_rows_written) == (1, 251, 251)
    assert len(report.problems) == 100
    assert report.problem_counts == {"missing_column": 250, "not_json": 1}
    bad = [json.loads(line) for line in (output / "bad.jsonl").read_bytes().splitlines()]
    assert [one["line"] for one in bad] == list(range(2, 253))
    assert bad[0]["row"] == {"prompt": "a"}
    assert bad[-1]["excerpt"] == "no"


def test_bad_rows_are_left_out_when_the_person_says_so(check: Check, output: Path) -> None:
    report = check(GOOD + "no\n" + GOOD, options=("--skip-bad",))
    assert (report.outcome, report.num_rows, report.num_bad_rows) == (Outcome.READY, 2, 1)
    assert len((output / "rows.jsonl").read_bytes().splitlines()) == 2


def test_an_unclosed_quote_costs_one_row_only(check: Check) -> None:
    body = "".join(f"question {number},answer {number}\n" for number in range(5000))
    report = check(f'prompt,completion\nx,"y\n{body}', "a.csv")
    assert (report.num_rows, report.num_bad_rows) == (5000, 1)
    assert report.problems[0].line == 2
