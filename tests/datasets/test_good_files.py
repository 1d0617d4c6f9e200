"""Good files of every layout, container and compression become canonical rows; oddities are noted."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from runs.datasets.report import Outcome
from tests.datasets.conftest import Check, chat_line, rows_of

Row = dict[str, Any]
ASKED = [{"role": "user", "content": "a\nü"}, {"role": "assistant", "content": 'b "q", c'}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
# Layout: format, kind, a row as uploaded, the canonical row.
LAYOUTS: dict[str, tuple[str, str, Row, Row]] = {
    "messages": ("messages", "chat", {"messages": ASKED, "id": 1}, {"messages": ASKED}),
    "sharegpt": (
        "sharegpt",
        "chat",
        {"conversations": [{"from": "human", "value": "a\nü"}, {"from": "gpt", "value": 'b "q", c'}]},
        {"messages": ASKED},
    ),
    "alpaca": (
        "alpaca",
        "chat",
        {"instruction": "a", "input": "ü", "output": "b"},
        {"messages": [{"role": "user", "content": "a\n\nü"}, {"role": "assistant", "content": "b"}]},
    ),
    "alpaca without input": (
        "alpaca",
        "chat",
        {"instruction": "a", "input": "", "output": "b", "system": "s"},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        },
    ),
    "completion": (
        "completion",
        "completion",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b"},
    ),
    "completion of messages": (
        "chat_completion",
        "chat",
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
        {"messages": ASKED},
    ),
    "text": ("text", "text", {"text": "a\n\nb", "source": "x"}, {"text": "a\n\nb"}),
    "preference": (
        "preference",
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"messages": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
    ),
    "preference of messages": (
        "preference",
        "preference",
        {
            "prompt": ASKED[:1],
            "chosen": ASKED[1:],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
        {"messages": ASKED[:1], "chosen": ASKED[1]["content"], "rejected": "c"},
    ),
    "preference of conversations": (
        "preference",
        "preference",
        {"chosen": ASKED, "rejected": [ASKED[0], {"role": "assistant", "content": "c"}]},
        {"messages": ASKED[:1], "chosen": ASKED[1]["content"], "rejected": "c"},
    ),
    "prompts": (
        "prompts",
        "prompts",
        {"question": "1+1?", "answer": "2"},
        {"messages": [{"role": "user", "content": "1+1?"}], "reference": "2"},
    ),
}


def _jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _json(rows: list[Row]) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def _parquet(rows: list[Row]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def _csv(rows: list[Row]) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0])
    writer.writeheader()
    for row in rows:
        writer.writerow({name: one if isinstance(one, str) else json.dumps(one) for name, one in row.items()})
    return stream.getvalue().encode()


CONTAINERS = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda raw: raw,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
}


# Parquet is compressed inside; in gzip or zstd it is refused.
WAYS = [(one, packer) for one in CONTAINERS for packer in PACKERS if one != "parquet" or packer == "none"]


@pytest.mark.parametrize(("container", "packer"), WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_becomes_canonical_rows(
    check: Check, output: Path, layout: str, container: str, packer: str
) -> None:
    format, kind, row, canonical = LAYOUTS[layout]
    report = check(PACKERS[packer](CONTAINERS[container]([row] * 3)), f"rows.{container}")
    assert report.outcome is Outcome.READY, report.error
    assert (report.format, report.kind, report.container) == (format, kind, container)
    assert report.compression == packer
    assert (report.num_rows, report.num_bad_rows, report.num_duplicates) == (3, 0, 2)
    assert report.columns == list(row)
    assert rows_of(output) == [canonical] * 3


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("padding", [b"", b"\0" * 600])
def test_parts_that_were_packed_one_by_one_are_joined(
    check: Check, output: Path, pack: Callable[[bytes], bytes], padding: bytes
) -> None:
    """`cat one.gz two.gz` is a gzip file, and tapes pad one with zeros."""
    content = pack(b'{"text":"a"}\n{"te') + pack(b'xt":"b"}\n')
    report = check(content + padding)
    if padding and pack is zstandard.compress:
        assert report.problems[0].code == "damaged_stream"
    else:
        assert rows_of(output) == [{"text": "a"}, {"text": "b"}]


def test_the_index_says_where_each_row_is(check: Check, output: Path) -> None:
    check("".join(f'{{"text":"{"ü" * number} row"}}\n' for number in range(100)))
    raw = (output / "rows.jsonl").read_bytes()
    offsets = np.fromfile(output / "rows.idx", dtype="<u8")
    assert len(offsets) == 101
    rows = [json.loads(raw[start:end]) for start, end in pairwise(offsets)]
    assert [row["text"] for row in rows] == [f"{'ü' * number} row" for number in range(100)]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff{one}\n{two}\n",
        "{one}\r\n{two}\r\n",
        "{one}\r{two}\r",
        "\n{one}\n  \n\n{two}",
        "[{one},{two}]",
        "\ufeff [ {one} ,\n {two} ]\n",
        '{{\n "text": "one"\n}}\n{{\n "text": "two"\n}}\n',
    ],
)
@pytest.mark.parametrize("filename", ["a.jsonl", "a.json", "a"])
def test_it_reads_json_however_the_lines_end(check: Check, output: Path, content: str, filename: str) -> None:
    report = check(content.format(one='{"text":"one"}', two='{"text":"two"}'), filename)
    assert report.outcome is Outcome.READY, report.error
    assert [row["text"] for row in rows_of(output)] == ["one", "two"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_it_finds_the_delimiter(check: Check, output: Path, delimiter: str, end: str) -> None:
    lines = ["prompt{}completion", "one{}two", '"x{} ""y"""{}"z{end}z"', "d{}e"]
    content = end.join(line.replace("{}", delimiter).replace("{end}", end) for line in lines) + end
    report = check("\ufeff" + content, "a.csv")
    assert report.outcome is Outcome.READY, report.error
    rows = [(row["prompt"], row["completion"]) for row in rows_of(output)]
    # A line break inside a cell stays as it is, but for the old Mac's.
    inner = "z\nz" if end == "\r" else f"z{end}z"
    assert rows == [("one", "two"), (f'x{delimiter} "y"', inner), ("d", "e")]


def test_a_table_is_recognised_without_a_name(check: Check) -> None:
    assert check("prompt,completion\na,b\n", "upload").container == "csv"
    assert check("Well, hello\nand, so on\n", "upload").container == "text"


def test_paragraphs_of_plain_text_become_rows(check: Check, output: Path) -> None:
    report = check("one\ntwo\n\n\nthree  \r\n \nfour" + "\n" + "x" * 20_000, "a.txt")
    assert [len(row["text"]) for row in rows_of(output)] == [7, 5, 4, 16_384, 3_616]
    assert [warned.code for warned in report.warnings] == ["paragraphs"]


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-32", "gb18030", "latin-1", "cp1252", "cp1251"]
)
def test_it_converts_what_it_was_told_to(check: Check, output: Path, encoding: str) -> None:
    text = {"gb18030": "你好", "cp1251": "Привет"}.get(encoding, "café")
    content = f'{{"prompt":"{text}","completion":"{text}"}}\n'.encode(encoding)
    refused = check(content)
    assert refused.outcome is Outcome.FAILED
    assert refused.problems[0].code == "not_utf8"
    assert check(content, options=(f"--encoding={encoding}",)).outcome is Outcome.READY
    assert rows_of(output) == [{"prompt": text, "completion": text}]


def test_no_conversion_is_offered_that_would_garble_other_rows(check: Check) -> None:
    latin = '{"text":"café"}\n'.encode("latin-1")
    assert check(latin + b'{"text":"tea"}\n').encoding == "latin-1"
    assert check(latin + '{"text":"thé"}\n'.encode()).encoding == "utf-8"


def test_tool_calls_are_kept_with_their_arguments_as_objects(check: Check, output: Path) -> None:
    asked = {"id": "c1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        {"role": "assistant", "content": "b", "mood": 1},
    ]
    report = check(json.dumps({"messages": messages, "tools": json.dumps(TOOLS)}))
    assert [warned.code for warned in report.warnings] == ["unused_message_keys"]
    row = rows_of(output)[0]
    assert row["tools"] == TOOLS
    assert row["messages"][1]["tool_calls"] == [{"id": "c1", **CALL}]
    assert row["messages"][2] == {"role": "tool", "content": "", "tool_call_id": "c1"}
    assert report.roles == {"user": 1, "assistant": 2, "tool": 1}


def test_function_calls_of_sharegpt_become_tool_calls(check: Check, output: Path) -> None:
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "b"},
    ]
    check(json.dumps({"conversations": turns, "system": "s"}))
    messages = rows_of(output)[0]["messages"]
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"] == [CALL]


def test_oddities_are_noted_with_their_first_line(check: Check) -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    content = chat_line(("user", "a"), ("assistant", "b")) + chat_line(("user", "a"), ("assistant", parts))
    content += chat_line(("user", "a"), ("assistant", "b"), ("user", "c"))
    content += chat_line(("user", "itâ€™s"), ("assistant", "\ufffd"))
    noted = {warned.code: (warned.count, warned.line) for warned in check(content).warnings}
    assert noted == {
        "content_parts": (1, 2),
        "unanswered_end": (1, 3),
        "mojibake": (1, 4),
        "replacement_characters": (1, 4),
    }


def test_lengths_are_counted_for_every_row_and_estimated_in_tokens(check: Check) -> None:
    tokenizer = Path("gpuworker/tiny/model/tokenizer.json").absolute()
    content = "".join(f'{{"text":"{"word " * (number + 1)}"}}\n' for number in range(6000))
    report = check(content, options=(f"--tokenizer=tiny={tokenizer}",))
    characters, tokens = report.characters, report.tokens["tiny"]
    assert characters is not None
    assert (characters.num_rows, characters.max, characters.is_estimate) == (6000, 30_000, False)
    assert characters.total == sum(5 * (number + 1) for number in range(6000))
    assert sum(one.count for one in characters.histogram) == 6000
    assert tokens.is_estimate
    assert 500 <= tokens.num_rows <= 5000
    assert 0.9 < tokens.total / (tokens.p50 * 6000) < 1.1
    assert tokens.p50 < tokens.p95 <= tokens.max
