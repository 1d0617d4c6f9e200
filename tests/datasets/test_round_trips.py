"""Canonical rows come back unchanged when they are uploaded again, whatever their texts hold."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runs.datasets import statistics
from runs.datasets.examination import Examination
from runs.datasets.report import Report
from tests.datasets.conftest import Check, rows_of

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda text: not text.isspace()
)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


def _chat(turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages = []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages}


ROWS = st.one_of(
    st.lists(TURNS.map(_chat), min_size=1, max_size=4),
    st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=4),
    st.lists(st.fixed_dictionaries({"text": TEXT}), min_size=1, max_size=4),
)


def _again(raw: bytes, filename: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "original"
        path.write_bytes(raw)
        examination = Examination(path=path, filename=filename, output=Path(folder))
        rows = examination.examine(lambda: None, {})
        assert rows is not None
        assert not examination.problems.first
        rows.keep()
        return rows_of(Path(folder))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=ROWS)
def test_canonical_rows_are_read_as_they_were_written(rows: list[dict[str, Any]]) -> None:
    assert _again(b"\n".join(map(orjson.dumps, rows)), "rows.jsonl") == rows
    assert _again(json.dumps(rows, indent=1).encode(), "rows.json") == rows


@given(length=st.integers(0, 2**40))
def test_every_length_is_inside_its_bin(length: int) -> None:
    low, high = statistics.bin_range(statistics.bin_of(length))
    assert low <= length <= high
    assert statistics.bin_of(high + 1) == statistics.bin_of(length) + 1


def test_a_report_survives_being_stored(check: Check) -> None:
    report = check('{"prompt":"a","completion":"b"}\n{"prompt":1}\n')
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report
