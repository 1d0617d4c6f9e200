"""Numbers: in buckets that hide no extreme, raw after a cursor, and all of them as files that can be read."""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import datetime
from typing import Any

import pyarrow.parquet as pq
import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from runs.models import Metric, TrainingRun
from tests.pages import seed
from tests.rest.client import Rest

VALUES = ["NaN", "Infinity", "-Infinity"]


@pytest.fixture
def odd(alice: Rest) -> TrainingRun:
    """Return a run with a spike, and with values that are no numbers."""
    run = seed.make_run(alice.user)
    seed.add_values(run, seed.curve(1000, spike_at=[700], nan_at=[5]))
    seed.add_values(run, [(3000, 1001, {"loss": math.inf, "=cmd()": -math.inf})])
    return run


def address(run: TrainingRun, rest: str = "") -> str:
    return f"runs/{run.public_id}/metrics{rest}"


def test_the_names_are_listed(alice: Rest, odd: TrainingRun) -> None:
    names = alice.get(address(odd))["names"]
    assert names == ["=cmd()", "grad_norm", "learning_rate", "loss", "step_time_s", "tokens_per_s"]


@pytest.mark.parametrize("buckets", [1, 7, 100, 2000])
def test_buckets_hide_no_extreme(alice: Rest, odd: TrainingRun, buckets: int) -> None:
    (series,) = alice.get(address(odd, f"/series?name=loss&buckets={buckets}"))["series"]
    found = series["buckets"]
    assert len(found) <= buckets
    stored = dict(Metric.objects.filter(run=odd, name="loss").values_list("step", "value"))
    finite = [value for value in stored.values() if math.isfinite(value)]
    assert sum(one["count"] for one in found) == 1001
    assert sum(one["num_nonfinite"] for one in found) == 2
    assert max(one["high"] for one in found if one["high"] is not None) == max(finite)
    assert min(one["low"] for one in found if one["low"] is not None) == min(finite)
    assert found[0]["step"] == 1
    assert found[-1]["last_step"] == 1001


def test_a_series_has_a_range_and_several_names(alice: Rest, odd: TrainingRun) -> None:
    query = "/series?name=loss&name=grad_norm&from_step=10&to_step=12"
    both = alice.get(address(odd, query))["series"]
    assert [one["name"] for one in both] == ["loss", "grad_norm"]
    assert [[bucket["step"] for bucket in one["buckets"]] for one in both] == [[10, 11, 12]] * 2
    assert len(alice.get(address(odd, "/series"))["series"]) == 6
    assert alice.get(address(odd, "/series?name=nothing"))["series"][0]["buckets"] == []
    assert alice.refused("GET", address(odd, "/series?buckets=2001"))["place"] == "buckets"


def test_a_page_smaller_than_a_step_holds_the_whole_step_and_reads_no_more(
    alice: Rest, odd: TrainingRun
) -> None:
    first = Metric.objects.filter(run=odd).order_by("seq")[0].seq
    of_step = set(Metric.objects.filter(run=odd, seq=first).values_list("name", flat=True))
    with CaptureQueriesContext(connection) as asked:
        page = alice.get(address(odd, "/values?limit=1"))
    assert {item["name"] for item in page["items"]} == of_step
    assert len(of_step) > 1
    assert page["has_more"]
    values = [one["sql"] for one in asked if 'FROM "runs_metric"' in one["sql"]]
    assert all("LIMIT" in sql or f'"seq" = {first}' in sql for sql in values), values


def test_raw_values_come_after_a_cursor(alice: Rest, odd: TrainingRun) -> None:
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = alice.get(address(odd, f"/values?limit=150{cursor}"))
        found += page["items"]
        cursor = f"&cursor={page['cursor']}"
        if not page["has_more"]:
            break
    assert len(found) == Metric.objects.filter(run=odd).count()
    assert len({(item["seq"], item["name"]) for item in found}) == len(found)
    words = {item["nonfinite"] for item in found if item["value"] is None}
    assert words == set(VALUES)
    assert alice.get(address(odd, f"/values?limit=150{cursor}"))["items"] == []
    seed.add_values(odd, [(4000, 1002, {"loss": 1.0})])
    later = alice.get(address(odd, f"/values?limit=150{cursor}"))
    assert [(item["step"], item["value"], item["nonfinite"]) for item in later["items"]] == [
        (1002, 1.0, None)
    ]


def test_a_cursor_of_values_is_for_its_run(alice: Rest, odd: TrainingRun, run: TrainingRun) -> None:
    cursor = alice.get(address(odd, "/values"))["cursor"]
    assert alice.refused("GET", address(run, f"/values?cursor={cursor}"))["place"] == "cursor"


def stored(run: TrainingRun, **only: str) -> list[tuple[int, int, datetime, str, float]]:
    """Return what an export has to hold."""
    rows = Metric.objects.filter(run=run, **only).order_by("seq", "name")
    return list(rows.values_list("seq", "step", "recorded_at", "name", "value"))


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def test_everything_is_in_the_csv_file(alice: Rest, odd: TrainingRun) -> None:
    content, headers = alice.download(address(odd, "/export"))
    assert headers["content-type"] == "text/csv; charset=utf-8"
    assert headers["content-disposition"] == f'attachment; filename="metrics-{odd.public_id[:8]}-0.csv"'
    head, *lines = csv.reader(io.StringIO(content.decode()))
    assert head == ["seq", "step", "recorded_at", "name", "value"]
    for line, row in zip(lines, stored(odd), strict=True):
        assert (int(line[0]), int(line[1]), datetime.fromisoformat(line[2])) == row[:3]
        assert line[3].removeprefix("'") == row[3]
        assert same(float(line[4]), row[4])
    assert b",'=cmd()," in content  # no spreadsheet runs it
    assert b",=cmd()," not in content


def test_everything_is_in_the_json_file(alice: Rest, odd: TrainingRun) -> None:
    content, headers = alice.download(address(odd, "/export?format=json"))
    assert headers["content-type"] == "application/json"
    found = json.loads(content, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    for item, row in zip(found, stored(odd), strict=True):
        value = item["value"] if item["value"] is not None else float(item["nonfinite"])
        assert (item["seq"], item["step"], datetime.fromisoformat(item["recorded_at"]), item["name"]) == row[
            :4
        ]
        assert same(value, row[4])


def test_everything_is_in_the_parquet_file(alice: Rest, odd: TrainingRun) -> None:
    content, headers = alice.download(address(odd, "/export?format=parquet"))
    assert headers["content-type"] == "application/vnd.apache.parquet"
    table = pq.read_table(io.BytesIO(content))
    assert table.column_names == ["seq", "step", "recorded_at", "name", "value"]
    for item, row in zip(table.to_pylist(), stored(odd), strict=True):
        assert (item["seq"], item["step"], item["recorded_at"], item["name"]) == row[:4]
        assert same(item["value"], row[4])


@pytest.mark.parametrize("format", ["csv", "json", "parquet"])
def test_one_metric_alone_is_exported(alice: Rest, odd: TrainingRun, format: str) -> None:
    content, _ = alice.download(address(odd, f"/export?format={format}&name=loss"))
    if format == "parquet":
        assert pq.read_table(io.BytesIO(content)).num_rows == 1001
    else:
        assert content.count(b"loss") == 1001
        assert b"grad_norm" not in content


@pytest.mark.parametrize("format", ["csv", "json", "parquet"])
def test_a_run_without_values_is_a_file_without_rows(alice: Rest, format: str) -> None:
    content, _ = alice.download(address(seed.make_run(alice.user), f"/export?format={format}"))
    if format == "parquet":
        assert pq.read_table(io.BytesIO(content)).num_rows == 0
    else:
        assert content == {"csv": b"seq,step,recorded_at,name,value\r\n", "json": b"[]\n"}[format]


def test_a_format_that_is_none_is_named(alice: Rest, run: TrainingRun) -> None:
    error = alice.refused("GET", address(run, "/export?format=xlsx"))
    assert error["place"] == "format"
    assert "'csv', 'json' or 'parquet'" in error["message"]
