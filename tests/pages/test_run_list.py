"""The start page."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import pytest
from django.test import Client
from django.utils import timezone

from runs.models import Recipe, User
from runs.pages import run_list
from runs.pages.run_list import PAGE_SIZE
from tests.pages import recipe_seed, seed

pytestmark = pytest.mark.django_db
Counter = Callable[..., AbstractContextManager[object]]


def names(page: Client, query: str = "") -> list[str]:
    rows = page.get(f"/runs/{query}").context["rows"]
    return [row.title for row in rows]


def test_it_counts_its_queries_whatever_the_number_of_runs(
    page: Client, alice: User, django_assert_num_queries: Counter
) -> None:
    for index in range(12):
        run = seed.make_run(alice, name=f"run {index}")
        seed.add_values(run, seed.curve(20))
        seed.add_operations(run)
    # session, user, runs, loss curves, base models, live worker
    with django_assert_num_queries(6):
        assert len(names(page)) == 12


def test_the_paces_of_all_runs_that_train_cost_one_query(
    page: Client, alice: User, django_assert_num_queries: Counter
) -> None:
    worker = seed.make_worker()
    for index in range(4):
        run = seed.make_run(alice, name=f"run {index}", worker=worker)
        seed.add_values(run, seed.curve(100), step_s=2.0)
        recipe_seed.make_recipe(run, num_steps=400)
    with django_assert_num_queries(7):
        rows = page.get("/runs/").context["rows"]
    assert {row.progress.time_left for row in rows} == {"9 to 11 min left"}


@pytest.mark.parametrize(
    ("state", "first_step", "percent", "time_left"),
    [
        ("running", 0, 25, "9 to 11 min left"),
        ("running", 98, 25, ""),  # two steps have no pace yet
        ("queued", 150, 37, ""),
        ("paused", 0, 25, ""),
        ("stopped", 0, None, ""),
        ("failed", 0, None, ""),
    ],
)
def test_it_shows_how_far_a_run_without_code_has_come(
    page: Client, alice: User, state: Recipe.State, first_step: int, percent: int | None, time_left: str
) -> None:
    run = seed.make_run(alice, worker=seed.make_worker())
    seed.add_values(run, seed.curve(100), step_s=2.0)
    recipe_seed.make_recipe(run, state=state, num_steps=400, first_step=first_step)
    reply = page.get("/runs/")
    (row,) = reply.context["rows"]
    assert (row.step, row.progress.num_steps) == (max(first_step, 100), 400)
    assert (row.progress.percent, row.progress.time_left) == (percent, time_left)
    text = reply.content.decode()
    assert (f'value="{percent}"' in text) is (percent is not None)
    assert ("<progress" in text) is (percent is not None)


def test_without_a_worker_nobody_knows_how_long_it_takes(page: Client, alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, seed.curve(100), step_s=2.0)
    recipe_seed.make_recipe(run, num_steps=400)
    (row,) = page.get("/runs/").context["rows"]
    assert (row.status, row.progress.percent, row.progress.time_left) == ("waiting for worker", 25, "")


def test_a_clients_run_has_no_end_that_anybody_knows(page: Client, alice: User) -> None:
    seed.make_run(alice)
    assert [row.progress for row in page.get("/runs/").context["rows"]] == [None]
    assert "<progress" not in page.get("/runs/").content.decode()


def test_it_shows_what_a_run_does(page: Client, alice: User) -> None:
    worker = seed.make_worker()
    run = seed.make_run(alice, name="busy one", worker=worker, source="browser")
    seed.add_values(run, [(2 * n, n, {"loss": 3.0 / n, "tokens_per_s": 12_345.0}) for n in range(1, 200)])
    seed.add_operations(run)
    text = page.get("/runs/").content.decode()
    row = text[text.index('class="run-row"') :]
    for expected in (
        "status-good",
        "running",
        "busy one",
        "badge-browser",
        "mintweb/tiny",
        "12.3k",
        "0.01508",
        "<polyline",
    ):
        assert expected in row


def test_those_that_did_something_last_come_first(page: Client, alice: User) -> None:
    now = timezone.now()
    old = seed.make_run(alice, name="old but busy", created_at=now - timedelta(days=9))
    seed.make_run(alice, name="new and idle", created_at=now - timedelta(hours=1))
    seed.make_run(alice, name="older", created_at=now - timedelta(days=3))
    seed.add_values(old, seed.curve(3))
    assert names(page) == ["old but busy", "new and idle", "older"]


def test_pages_hold_every_run_once(page: Client, alice: User) -> None:
    session = seed.make_run(alice).session
    now = timezone.now()
    for index in range(2 * PAGE_SIZE + 5):
        seed.make_run(
            alice, name=f"run {index}", session=session, created_at=now - timedelta(seconds=index // 3)
        )
    seen: list[str] = []
    query = ""
    for _ in range(3):
        reply = page.get(f"/runs/?{query}")
        seen += [row.run_id for row in reply.context["rows"]]
        query = reply.context["next_query"]
    assert query == ""
    assert len(seen) == len(set(seen)) == 2 * PAGE_SIZE + 6


def test_a_damaged_cursor_shows_the_first_page(page: Client, alice: User) -> None:
    seed.make_run(alice, name="here")
    assert names(page, "?after=nonsense") == ["here"]


def test_it_searches_and_filters_by_the_address(page: Client, alice: User) -> None:
    seed.make_run(alice, name="Blue fox", state="closed")
    failed = seed.make_run(alice, name="red fox", state="failed", error="too hot")
    seed.make_run(alice, name="bear")
    assert set(names(page, "?q=FOX")) == {"Blue fox", "red fox"}
    assert names(page, "?q=fox&status=failed") == ["red fox"]
    assert names(page, f"?q={failed.public_id}") == ["red fox"]
    assert names(page, "?status=waiting for client") == ["bear"]
    assert b"No run matches" in page.get("/runs/?q=%00").content or names(page, "?q=%00")


@pytest.mark.parametrize("found", ["?q=fox", "?status=failed"])
def test_a_search_goes_through_so_many_runs_at_a_time_and_says_so(
    page: Client, alice: User, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(run_list, "SEARCH_SPAN", 3)
    now = timezone.now()
    for index, name in enumerate(("fox 0", "bear", "owl", "cat", "fox 1", "dog")):
        seed.make_run(
            alice,
            name=name,
            state="failed" if "fox" in name else "open",
            created_at=now - timedelta(seconds=index // 2),
        )
    reply = page.get(f"/runs/{found}")
    assert [row.title for row in reply.context["rows"]] == ["fox 0"]
    assert "Searched the newest 3 runs." in reply.content.decode()
    older = page.get(f"/runs/?{reply.context['next_query']}")
    assert [row.title for row in older.context["rows"]] == ["fox 1"]
    assert older.context["next_query"] == ""
    assert "Searched" not in older.content.decode()
    assert "Searched" not in page.get("/runs/").content.decode()


@pytest.mark.parametrize(
    ("status", "has_worker", "has_work", "is_recent"),
    [
        ("running", True, True, False),
        ("running", True, False, True),
        ("waiting for client", True, False, False),
        ("waiting for worker", False, True, False),
    ],
)
def test_the_filter_agrees_with_the_state_shown(
    page: Client, alice: User, status: str, has_worker: bool, has_work: bool, is_recent: bool
) -> None:
    worker = seed.make_worker() if has_worker else None
    run = seed.make_run(alice, worker=worker)
    # An hour ahead: recent, however long the requests take.
    seed.add_values(run, seed.curve(2), ends_at=timezone.now() - timedelta(minutes=-60 if is_recent else 5))
    if has_work:
        seed.add_operations(run, num_done=0)
    assert [row.status for row in page.get("/runs/").context["rows"]] == [status]
    for state in ("running", "queued", "waiting for client", "waiting for worker", "finished", "failed"):
        assert len(names(page, f"?status={state}")) == (1 if state == status else 0), state


def test_a_base_model_that_failed_is_always_named(page: Client, alice: User, tmp_path: Path) -> None:
    seed.make_base_model(tmp_path, error="out of memory: 12 GB needed")
    seed.make_run(alice)
    assert b"out of memory: 12 GB needed" in page.get("/runs/").content


def test_the_first_visit_shows_how_to_begin(page: Client, alice: User) -> None:
    text = page.get("/runs/").content.decode()
    assert "base_url=&quot;http://testserver&quot;" in text or 'base_url="http://testserver"' in text
    assert "Create an API key" in text
    assert "mintweb/tiny" in text


def test_other_peoples_runs_are_not_listed(page: Client, bob: User) -> None:
    seed.make_run(bob, name="bob's")
    assert names(page) == []
