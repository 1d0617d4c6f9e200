"""Unknown columns get a suggestion and wait for a mapping; a mapping makes any file one of the layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs.datasets.report import Outcome
from tests.datasets.conftest import Check, rows_of

SUGGESTED: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"Frage": "a", "Antwort": "b"}, {"prompt": "Frage", "completion": "Antwort"}),
    ({"id": 1, "问题": "a", "回答": "b"}, {"prompt": "问题", "completion": "回答"}),
    ({"user_question": "a", "bot_reply": "b"}, {"prompt": "user_question", "completion": "bot_reply"}),
    ({"body": "a"}, {"text": "body"}),
    ({"c1": "short", "c2": "a longer text", "c3": "x"}, {"prompt": "c1", "completion": "c2"}),
    ({"only": "a"}, {"text": "only"}),
    ({"dialog": [{"role": "user", "content": "a"}]}, {"messages": "dialog"}),
    ({"turns": [{"from": "human", "value": "a"}]}, {"conversations": "turns"}),
    ({"number": 1}, {}),
]


@pytest.mark.parametrize(("row", "suggested"), SUGGESTED)
def test_it_suggests_a_mapping(check: Check, row: dict[str, Any], suggested: dict[str, str]) -> None:
    report = check(json.dumps(row))
    assert report.outcome is Outcome.NEEDS_MAPPING
    assert report.suggested_mapping == suggested
    assert report.columns == list(row)
    assert report.sample == [{name: str(value) for name, value in row.items()}]
    assert next(iter(row)) in report.error


@pytest.mark.parametrize(
    ("row", "mapping", "canonical"),
    [
        (
            {"Frage": "a", "Antwort": "b", "x": 1},
            {"prompt": "Frage", "completion": "Antwort"},
            {"prompt": "a", "completion": "b"},
        ),
        ({"question": "a", "answer": "b"}, {"text": "answer"}, {"text": "b"}),
        (
            {"q": "a", "gold": 4},
            {"prompt": "q", "reference": "gold"},
            {"messages": [{"role": "user", "content": "a"}], "reference": "4"},
        ),
        (
            {"task": "a", "data": "b", "result": "c"},
            {"instruction": "task", "input": "data", "output": "result"},
            {"messages": [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]},
        ),
        (
            {"talk": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"conversations": "talk"},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ),
    ],
)
def test_a_mapping_is_followed(
    check: Check, output: Path, row: dict[str, Any], mapping: dict[str, str], canonical: dict[str, Any]
) -> None:
    report = check(json.dumps(row), mapping=mapping)
    assert report.outcome is Outcome.READY, report.error
    assert report.mapping == mapping
    assert rows_of(output) == [canonical]


@pytest.mark.parametrize(
    ("mapping", "says", "fix"),
    [
        ({"prompt": "nope", "completion": "b"}, "'nope'", "use one of a, b"),
        ({"promt": "a", "completion": "b"}, "'promt'", "prompt"),
        ({"prompt": "a"}, "no known format", "prompt + completion"),
        ({"messages": "a", "completion": "b"}, "no known format", "prompt + completion"),
    ],
)
def test_a_mapping_that_does_not_fit_asks_again(
    check: Check, mapping: dict[str, str], says: str, fix: str
) -> None:
    report = check('{"a":"x","b":"y"}', mapping=mapping)
    assert report.outcome is Outcome.NEEDS_MAPPING
    assert says in report.error
    assert fix in report.fix
    assert report.suggested_mapping


def test_problems_name_the_mapped_column(check: Check) -> None:
    content = '{"Frage":"a","Antwort":"b"}\n{"Frage":"a","Antwort":null}\n'
    report = check(content, mapping={"prompt": "Frage", "completion": "Antwort"})
    assert (report.problems[0].line, report.problems[0].field) == (2, "Antwort")
