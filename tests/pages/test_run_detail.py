"""A run's page and the numbers behind its charts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.test import Client
from tokenizers import Tokenizer

from runs.models import Metric, RunEvent, TrainingRun, User
from runs.pages import checkpoints as checkpoint_table
from runs.services import checkpoints, metrics
from tests.pages import seed
from tests.services import rows

pytestmark = pytest.mark.django_db
Counter = Callable[..., AbstractContextManager[object]]


def all_points(page: Client, run: TrainingRun, after: int = -1) -> list[list[Any]]:
    points: list[list[Any]] = []
    while True:
        content = page.get(f"/runs/{run.public_id}/metrics.json?after={after}").json()
        points += content["points"]
        after = content["cursor"]
        if not content["more"]:
            return points


def streamed(reply: Any) -> bytes:
    async def collect() -> bytes:
        return b"".join([part async for part in reply.streaming_content])

    return async_to_sync(collect)()


def test_it_counts_its_queries(
    page: Client, run: TrainingRun, tokenizer: Tokenizer, django_assert_num_queries: Counter
) -> None:
    for name in ("a", "b", "c"):
        seed.add_checkpoint(run, name)
        seed.add_sample(run, seed.chat(tokenizer, name), [[5, 6]])
        RunEvent.objects.create(run=run, seq=1, kind="saved")
    # session, user, run three times (access, its version, then its state), size of the past, samples, base models,
    # checkpoints and their losses, operations, events, forks, what would be deleted, unfinished operations and
    # samples, whether the client has left, whether a worker comes, workers (why it waits)
    with django_assert_num_queries(19):
        assert page.get(f"/runs/{run.public_id}/").status_code == 200


def test_it_shows_the_run(page: Client, run: TrainingRun) -> None:
    seed.add_checkpoint(run, "step-000030", days=7)
    RunEvent.objects.create(run=run, seq=1, step=12, kind="recovered", detail={"worker": "gpu-9"})
    text = page.get(f"/runs/{run.public_id}/").content.decode()
    for expected in (
        "alice&#x27;s run",
        "rank 16",
        "step-000030",
        "recovered",
        "gpu-9",
        "forward_backward",
        "0.38.0",
    ):
        assert expected in text
    assert f"tinker://{run.public_id}/weights/step-000030" in text


def test_checkpoints_that_the_page_has_are_not_sent_again(
    page: Client, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of hundreds would load them with every few steps."""
    monkeypatch.setattr(checkpoint_table, "time", SimpleNamespace(time=lambda: 0.0))
    checkpoint = rows.make_checkpoint(run)
    panels = f"/runs/{run.public_id}/panels/"
    version = page.get(f"/runs/{run.public_id}/").context["checkpoints_version"]
    again = page.get(panels, {"checkpoints": version}).content.decode()
    assert 'data-part="events"' in again
    assert 'data-part="checkpoints"' not in again
    checkpoints.set_ttl(checkpoint, 3600)
    changed = page.get(panels, {"checkpoints": version}).content.decode()
    assert 'data-part="checkpoints"' in changed


def test_panels_are_the_same_parts_as_on_the_page(page: Client, run: TrainingRun) -> None:
    text = page.get(f"/runs/{run.public_id}/panels/").content.decode()
    for part in ("facts", "lineage", "samples", "checkpoints", "operations", "events"):
        assert f'data-part="{part}"' in text


def test_values_come_in_order_and_each_once(page: Client, run: TrainingRun) -> None:
    points = all_points(page, run)
    assert [(point[0], point[3]) for point in points] == sorted((point[0], point[3]) for point in points)
    assert len(points) == Metric.objects.filter(run=run).count() == 150
    assert all_points(page, run, after=points[74][0]) == [p for p in points if p[0] > points[74][0]]
    assert all_points(page, run, after=10**12) == []


def test_an_operation_with_more_values_than_a_page_is_not_cut(run: TrainingRun) -> None:
    seed.add_values(run, [(1000, 31, {f"m{n:03}": 1.0 for n in range(50)}), (1002, 32, {"loss": 1.0})])
    first = metrics.points_after(run, 60, limit=20)
    assert {point.seq for point in first} == {1000}
    assert len(first) == 50
    assert [point.seq for point in metrics.points_after(run, 1000, limit=20)] == [1002]


def test_values_that_are_not_finite_are_words(page: Client, alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, [(1, 1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5})])
    assert [point[4] for point in all_points(page, run)] == ["NaN", "Infinity", "-Infinity", 0.5]


@pytest.mark.parametrize(
    "query", ["metrics.json?after=x", "series.json?weight=1", "series.json?weight=nan", "series.json?from=a"]
)
def test_a_bad_question_is_refused(page: Client, run: TrainingRun, query: str) -> None:
    reply = page.get(f"/runs/{run.public_id}/{query}", headers={"accept": "application/json"})
    assert reply.status_code == 422
    assert reply.json()["code"] == "invalid_request"


def test_buckets_hide_no_extreme(page: Client, alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, seed.curve(3000, spike_at=[1777], nan_at=[5]))
    series = page.get(f"/runs/{run.public_id}/series.json?name=loss&buckets=100&weight=0.9").json()["series"][
        0
    ]
    stored = dict(Metric.objects.filter(run=run, name="loss").values_list("step", "value"))
    finite = [value for value in stored.values() if math.isfinite(value)]
    assert len(series["step"]) <= 100
    assert series["width"] == 32
    assert max(series["high"]) == max(finite)
    assert min(series["low"]) == min(finite)
    assert sum(series["num_values"]) == 3000
    assert sum(series["num_nonfinite"]) == 1
    assert series["num_nonfinite"][0] == 1
    assert (series["first_value"], series["last_value"]) == (finite[0], finite[-1])


def test_smoothing_sees_every_value_and_starts_unbiased(page: Client, alice: User) -> None:
    run = seed.make_run(alice)
    values = [4.0, 2.0, math.nan, 3.0, 1.0]
    seed.add_values(run, [(n, n, {"loss": value}) for n, value in enumerate(values)])
    series = page.get(f"/runs/{run.public_id}/series.json?name=loss&weight=0.5").json()["series"][0]
    # by hand: sums 4; 2+4/2; 3 at step 3 decays two steps; 1
    expected = [4.0, 4.0 / 1.5, None, (3 + 4 / 4) / (1 + 1.5 / 4), (1 + 4 / 2) / (1 + 1.375 / 2)]
    assert series["smooth"] == [pytest.approx(value) if value is not None else None for value in expected]
    constant = seed.make_run(alice)
    seed.add_values(constant, [(n, n, {"loss": 0.7}) for n in range(50)])
    series = page.get(f"/runs/{constant.public_id}/series.json?name=loss&weight=0.99").json()["series"][0]
    assert series["smooth"] == pytest.approx([0.7] * 50)


def test_a_closer_look_has_finer_buckets(page: Client, alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, seed.curve(3000))
    series = page.get(f"/runs/{run.public_id}/series.json?name=loss&buckets=100&from=1000&to=1050").json()[
        "series"
    ][0]
    assert series["width"] == 1
    assert series["step"] == list(range(1000, 1051))


def test_a_metric_without_values_has_empty_columns(page: Client, run: TrainingRun) -> None:
    series = page.get(f"/runs/{run.public_id}/series.json?name=nothing").json()["series"][0]
    assert series["step"] == series["mean"] == series["num_values"] == []


def test_the_csv_holds_every_value_as_a_number(page: Client, alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, [(1, 1, {"loss": -1.5, "=cmd()": 2.0}), (3, 2, {"loss": math.nan})])
    reply = page.get(f"/runs/{run.public_id}/metrics.csv")
    assert reply["content-disposition"].startswith("attachment;")
    rows = list(csv.DictReader(io.StringIO(streamed(reply).decode())))
    assert [(row["name"], row["value"]) for row in rows] == [
        ("'=cmd()", "2.0"),
        ("loss", "-1.5"),
        ("loss", "NaN"),
    ]
    chosen = streamed(page.get(f"/runs/{run.public_id}/metrics.csv?name=loss")).decode()
    assert "cmd" not in chosen
    assert chosen.count("\r\n") == 3


def test_a_run_is_renamed(page: Client, run: TrainingRun) -> None:
    reply = page.post(f"/runs/{run.public_id}/rename", {"name": "  new\x00 na\u202eme  "})
    assert reply.status_code == 302
    run.refresh_from_db()
    assert run.name == "new name"


def test_samples_are_text_with_special_tokens_set_apart(
    page: Client, run: TrainingRun, tokenizer: Tokenizer
) -> None:
    answer = tokenizer.encode(f"The bear sleeps.{seed.END}").ids
    seed.add_sample(run, seed.chat(tokenizer, "Where?"), [answer])
    text = page.get(f"/runs/{run.public_id}/").content.decode()
    assert "The bear sleeps." in text
    assert '<span class="special-token">&lt;|im_end|&gt;</span>' in text


def test_samples_that_only_ask_for_logprobs_are_left_out(
    page: Client, run: TrainingRun, tokenizer: Tokenizer
) -> None:
    seed.add_sample(run, [5, 6, 7], [[8]], prompt_logprobs=True, sampling_params={"max_tokens": 1})
    assert page.get(f"/runs/{run.public_id}/").context["samples"] == []


def test_samples_without_a_tokenizer_are_numbers(page: Client, run: TrainingRun) -> None:
    run.base_model = "no/longer-offered"
    run.save(update_fields=["base_model"])
    seed.add_sample(run, [5, 6, 7], [[8, 9]])
    assert "8 9" in page.get(f"/runs/{run.public_id}/").content.decode()


PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'-alert(1)-'",
    "</script><svg onload=alert(1)>",
    "{{ 7 }}<b>x</b>",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_texts_are_shown_as_text(
    page: Client, alice: User, tokenizer: Tokenizer, payload: str
) -> None:
    run = seed.make_run(alice, name=payload, user_metadata={payload: payload}, error=payload)
    seed.add_values(run, [(1, 1, {payload[:64]: 1.0})])
    seed.add_operations(run, num_done=2, error=payload)
    seed.add_sample(run, tokenizer.encode(payload).ids, [tokenizer.encode(payload).ids])
    RunEvent.objects.create(run=run, seq=1, kind=payload[:40], detail={payload: payload})
    for path in ("/runs/", f"/runs/{run.public_id}/", f"/runs/{run.public_id}/panels/"):
        text = page.get(path).content.decode()
        assert payload not in text
        for tag in ("<script>alert", "<img src=x", "<svg onload", "<b>x"):
            assert tag not in text
