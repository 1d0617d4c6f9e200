"""An answer of weight 0 keeps it, so that it is not learned; any other weight than 0 and 1 is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs.datasets.report import Outcome
from tests.datasets.conftest import Check, rows_of


def weighted(*weights: Any, **of_the_question: Any) -> dict[str, Any]:
    """Return a row of questions, each with an answer of this weight."""
    messages = []
    for weight in weights:
        messages.append({"role": "user", "content": "a", **of_the_question})
        messages.append({"role": "assistant", "content": "b", "weight": weight})
    return {"messages": messages}


def line_of(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def test_only_a_weight_of_zero_is_kept(check: Check, output: Path) -> None:
    report = check(line_of(weighted(0, 1, None, 0.0, 1.0)))
    assert report.outcome is Outcome.READY, report.error
    (row,) = rows_of(output)
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    assert [answer.get("weight") for answer in answers] == [0, None, None, 0, None]
    assert report.warnings == []


def test_a_weight_of_the_users_is_told_to_be_unused(check: Check, output: Path) -> None:
    report = check(line_of(weighted(1, weight=0)))
    assert [one.code for one in report.warnings] == ["unused_message_keys"]
    assert all("weight" not in message for message in rows_of(output)[0]["messages"])


def test_sharegpt_keeps_the_weight_of_answers_and_calls(check: Check, output: Path) -> None:
    call = {"name": "f", "arguments": {}}
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": call, "weight": 0},
        {"from": "observation", "value": "c"},
        {"from": "gpt", "value": "b", "weight": 1},
    ]
    assert check(line_of({"conversations": turns})).outcome is Outcome.READY
    (row,) = rows_of(output)
    assert [message.get("weight") for message in row["messages"]] == [None, 0, None, None]


@pytest.mark.parametrize("weight", [2, -1, 0.5, "0", True, False, [0]])
def test_another_weight_is_a_problem_of_its_line(check: Check, weight: Any) -> None:
    report = check(line_of(weighted(1)) + line_of(weighted(1, weight)))
    assert report.outcome is Outcome.NEEDS_CHOICE
    (problem,) = report.problems
    assert (problem.code, problem.line, problem.field) == ("bad_weight", 2, "messages[3].weight")
    assert problem.reason == f"the weight is {weight!r}, not 0 or 1"
    assert "write 0" in problem.fix


def test_a_row_whose_answers_all_have_weight_zero_teaches_nothing(check: Check) -> None:
    report = check(line_of(weighted(1)) + line_of(weighted(0, 0)))
    (problem,) = report.problems
    assert (problem.code, problem.line, problem.field) == ("no_weight", 2, "messages")
    assert "nothing to learn" in problem.reason
