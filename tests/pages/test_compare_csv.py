"""The values of several runs as one CSV file: whose, in which rows, and what a spreadsheet makes of its cells."""

from __future__ import annotations

import csv
import io
import math
import re
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.test import Client
from django.utils import timezone

from runs.models import TrainingRun, User
from runs.pages.comparison import query_of
from runs.services import compared_exports
from runs.services.comparisons import MAX_RUNS
from tests.pages import recipe_seed, seed
from tests.pages.test_compare import Counter, address, make_runs

pytestmark = pytest.mark.django_db


def csv_of(page: Client, *runs: TrainingRun) -> list[list[str]]:
    reply = page.get(address(*runs, page="/runs/compare/metrics.csv"))
    assert reply.status_code == 200
    assert reply["Content-Type"] == "text/csv; charset=utf-8"
    return list(csv.reader(io.StringIO(content_of(reply))))


def content_of(reply: Any) -> str:
    async def read() -> bytes:
        return b"".join([part async for part in reply.streaming_content])

    return async_to_sync(read)().decode()


def test_what_is_compared_can_be_downloaded(page: Client, alice: User) -> None:
    now = timezone.now()
    first, second = make_runs(alice, 2)
    TrainingRun.objects.update(created_at=now - timedelta(seconds=100))
    seed.add_values(first, [(1, 1, {"loss": 2.5, "tokens": 64.0}), (3, 2, {"loss": math.nan})], ends_at=now)
    recipe_seed.make_recipe(second, started_at=now - timedelta(seconds=10))
    seed.add_values(
        second, [(1, 0, {"validation_loss": 3.0}), (2, 1, {"loss": -1.5, "reward": math.inf})], ends_at=now
    )
    seed.add_values(second, [(3, 1, {"validation_loss": 2.0})], ends_at=now)
    assert csv_of(page, second, first) == [
        ["run", "run_id", "step", "tokens_so_far", "seconds", "loss", "validation_loss", "reward", "tokens"],
        ["run 1", second.public_id, "0", "", "9.000", "", "3.0", "", ""],
        ["run 1", second.public_id, "1", "", "10.000", "-1.5", "2.0", "Infinity", ""],
        ["run 0", first.public_id, "1", "64", "99.000", "2.5", "", "", "64.0"],
        ["run 0", first.public_id, "2", "64", "100.000", "NaN", "", "", ""],
    ]
    text = page.get(address(first, second)).content.decode()
    link = address(first, second, page="/runs/compare/metrics.csv").replace("&", "&amp;")
    assert f'href="{link}"' in text


def test_a_file_has_what_a_run_left_behind_and_counts_tokens_on_from_where_it_went_back(
    page: Client, alice: User
) -> None:
    run = seed.make_run(alice)
    steps = [1, 2, 3, 2, 3]
    seed.add_values(run, [(2 * seq, step, {"tokens": 10.0 * seq}) for seq, step in enumerate(steps, start=1)])
    rows = csv_of(page, run)[1:]
    assert [(row[2], row[3]) for row in rows] == [
        ("1", "10"),
        ("2", "30"),
        ("3", "60"),
        ("2", "50"),
        ("3", "100"),
    ]


def test_no_value_of_a_long_run_is_lost_between_two_parts_of_the_file(
    page: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compared_exports, "MAX_PART_VALUES", 7)
    runs = make_runs(alice, 3)
    for run, num_steps in zip(runs, (2, 23, 1), strict=True):
        seed.add_values(run, [(step, step, {"loss": 1.0}) for step in range(1, num_steps + 1)])
        # A second value of the step, by a later operation.
        seed.add_values(run, [(num_steps + 1, num_steps, {"validation_loss": 0.5})])
    rows = csv_of(page, *runs)[1:]
    expected = [
        (run.name, str(step)) for run, n in zip(runs, (2, 23, 1), strict=True) for step in range(1, n + 1)
    ]
    assert [(row[0], row[2]) for row in rows] == expected
    assert [row[2] for row in rows if row[6]] == ["2", "23", "1"]
    assert all(row[5] for row in rows)


def test_a_file_counts_its_queries_whatever_the_number_of_runs(
    page: Client, alice: User, django_assert_num_queries: Counter
) -> None:
    runs = make_runs(alice, MAX_RUNS)
    for run in runs:
        seed.add_values(run, seed.curve(20))
    for some in (runs[:2], runs):
        # session, user, runs, names of metrics, values
        with django_assert_num_queries(5):
            assert len(csv_of(page, *some)) == 1 + 20 * len(some)


def test_a_spreadsheet_runs_no_cell_of_a_file(page: Client, alice: User) -> None:
    run = seed.make_run(alice, name="=HYPERLINK(1)")
    seed.add_values(run, [(1, 1, {"@SUM(1)": 1.0, "loss": -2.0})])
    head, row = csv_of(page, run)
    assert head[5:] == ["loss", "'@SUM(1)"]
    assert row[0] == "'=HYPERLINK(1)"
    assert row[5:] == ["-2.0", "1.0"]


def test_a_file_is_of_ones_own_runs_and_of_all_that_were_asked_for(
    page: Client, alice: User, bob: User
) -> None:
    mine, theirs = seed.make_run(alice), seed.make_run(bob)
    texts = []
    for run_id in (theirs.public_id, "gone"):
        reply = page.get(f"/runs/compare/metrics.csv?{query_of([mine.public_id, run_id])}")
        assert reply.status_code == 404
        texts.append(re.sub(r'csrfmiddlewaretoken" value="\w+"', "", reply.content.decode()))
    assert texts[0] == texts[1]
    assert page.get("/runs/compare/metrics.csv").status_code == 404
    many = make_runs(alice, MAX_RUNS + 1)
    assert page.get(address(*many, page="/runs/compare/metrics.csv")).status_code == 422
    assert csv_of(page, mine) == [["run", "run_id", "step", "tokens_so_far", "seconds"]]
