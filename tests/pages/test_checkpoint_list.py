"""The list of checkpoints: pages in each order, filters and a search in the address, and the way back to them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from django.core import signing
from django.db import connection
from django.http import QueryDict
from django.test import Client
from django.utils import timezone

from runs.models import Checkpoint, TrainingRun, User
from runs.pages import checkpoint_list
from runs.services import tallies
from tests.pages import recipe_seed, seed

pytestmark = pytest.mark.django_db
FIRST = "/checkpoints/"
# Checkpoints of one run, one a second, every tenth with the optimizer; of either kind all have one size.
_FILL = """
INSERT INTO runs_checkpoint (owner_id, run_id, kind, name, is_ephemeral, directory, size_bytes, seq, step, is_public,
  user_metadata, created_at)
SELECT %(owner)s, %(run)s, CASE WHEN n %% 10 = 0 THEN 'weights' ELSE 'sampler_weights' END, 'filled-' || n, false,
  'checkpoints/0/' || n, CASE WHEN n %% 10 = 0 THEN 3 ELSE 1 END, n, n, false, '{}', now() - n * interval '1 second'
FROM generate_series(1, %(number)s) n
"""


def fill(run: TrainingRun, number: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute(_FILL, {"owner": run.owner_id, "run": run.pk, "number": number})
        cursor.execute("ANALYZE runs_checkpoint")


def text_of(page: Client, address: str) -> str:
    reply = page.get(address)
    assert reply.status_code == 200
    return html.unescape(reply.content.decode())


def names(text: str) -> list[str]:
    return re.findall(r'<tr data-key="tinker://[^"]*/([^"/]+)"', text)


def linked(text: str, label: str) -> str | None:
    """Return where a link of the list leads."""
    found = re.search(rf'<a (?:class="[a-z-]*" )?href="([^"]*)">{label}</a>', text)
    return FIRST + found[1].removeprefix(FIRST) if found else None


def walk(page: Client, address: str, label: str) -> list[str]:
    """Return the names on all pages from this one on."""
    listed: list[str] = []
    following: str | None = address
    while following is not None:
        text = text_of(page, following)
        listed += names(text)
        following = linked(text, label)
    return listed


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_list, "PAGE_SIZE", 3)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(
    ("query", "label", "order"),
    [
        ("", "Older checkpoints", range(1, 41)),
        ("?sort=oldest", "Newer checkpoints", range(40, 0, -1)),
        (
            "?sort=largest",
            "Smaller checkpoints",
            [*range(40, 0, -10), *(n for n in range(40, 0, -1) if n % 10)],
        ),
    ],
)
def test_every_checkpoint_is_on_one_page(
    page: Client, run: TrainingRun, query: str, label: str, order: Iterable[int]
) -> None:
    fill(run, 40)
    assert walk(page, FIRST + query, label) == [f"filled-{n}" for n in order]


def test_more_than_a_page_are_reached_and_counted(page: Client, run: TrainingRun) -> None:
    fill(run, 501)
    text = text_of(page, FIRST)
    assert "501 take 601 B" in text
    assert len(names(text)) == checkpoint_list.PAGE_SIZE
    assert "First page" not in text
    listed = walk(page, FIRST, "Older checkpoints")
    assert len(listed) == len(set(listed)) == 501


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("sort", ["newest", "oldest", "largest"])
def test_those_of_one_moment_and_size_are_all_there(page: Client, run: TrainingRun, sort: str) -> None:
    fill(run, 10)
    Checkpoint.objects.update(created_at=timezone.now(), size_bytes=7)
    label = {"newest": "Older", "oldest": "Newer", "largest": "Smaller"}[sort] + " checkpoints"
    listed = walk(page, f"{FIRST}?sort={sort}", label)
    assert sorted(listed) == sorted(f"filled-{n}" for n in range(1, 11))
    assert len(listed) == 10


@pytest.mark.usefixtures("small_pages")
def test_it_is_filtered_by_run_and_kind_on_each_page(page: Client, alice: User, run: TrainingRun) -> None:
    fill(run, 40)
    other = seed.make_run(alice, name="other")
    fill(other, 7)
    of_run = f"{FIRST}?run={quote(other.public_id)}"
    text = text_of(page, of_run)
    assert "7 take 7 B" in text
    assert f'Of the run <a href="/runs/{other.public_id}/"><bdi>other</bdi></a>' in text
    assert walk(page, of_run, "Older checkpoints") == [f"filled-{n}" for n in range(1, 8)]
    assert linked(text, "All runs") == FIRST
    of_kind = f"{FIRST}?kind=weights&sort=oldest"
    assert walk(page, of_kind, "Newer checkpoints") == [f"filled-{n}" for n in (40, 30, 20, 10)]
    both = f"{FIRST}?kind=weights&run={quote(run.public_id)}&sort=largest"
    assert walk(page, both, "Smaller checkpoints") == [f"filled-{n}" for n in (40, 30, 20, 10)]
    text = text_of(page, both)
    assert linked(text, "All runs") == f"{FIRST}?kind=weights&sort=largest"
    assert '<option value="weights" selected>' in text
    assert '<option value="largest" selected>' in text
    assert f'<input type="hidden" name="run" value="{run.public_id}">' in text
    assert "take" not in text.partition("checkpoint-sum")[2].partition("</span>")[0]


@pytest.mark.parametrize("search", ["STORY", "filled-13", "%s"])
def test_it_is_searched_by_checkpoint_and_run(
    page: Client, alice: User, run: TrainingRun, search: str
) -> None:
    fill(run, 20)
    other = seed.make_run(alice, name="a story")
    seed.add_checkpoint(other, "end")
    expected = "filled-13" if search == "filled-13" else "end"
    text = text_of(page, f"{FIRST}?q={quote(search % other.public_id if '%' in search else search)}")
    assert names(text) == [expected]


def test_a_long_search_goes_on_where_it_stopped(
    page: Client, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_list, "SEARCH_SPAN", 8)
    fill(run, 20)
    text = text_of(page, f"{FIRST}?q=filled-17")
    assert "No checkpoint matches among these." in text
    assert "Searched the newest 8 checkpoints." in text
    address = linked(text, "Search older checkpoints")
    assert address is not None
    assert parse_qs(urlsplit(address).query)["q"] == ["filled-17"]
    text = text_of(page, address)
    assert "Searched another 8 checkpoints." in text
    address = linked(text, "Search older checkpoints")
    assert address is not None
    text = text_of(page, address)
    assert names(text) == ["filled-17"]
    assert linked(text, "Search older checkpoints") is None
    assert linked(text, "First page") == f"{FIRST}?q=filled-17"
    assert walk(page, f"{FIRST}?q=filled-1&sort=oldest", "Search newer checkpoints") == [
        f"filled-{n}" for n in (19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 1)
    ]


def test_nothing_to_show_says_why_and_leads_back(page: Client, bob: User, run: TrainingRun) -> None:
    assert "No checkpoints yet." in text_of(page, FIRST)
    seed.add_checkpoint(run, "end")
    theirs = seed.make_run(bob)
    seed.add_checkpoint(theirs, "secret")
    for query in (
        "q=nothing",
        "kind=sampler_weights",
        f"run={quote(theirs.public_id)}",
        "run=none",
        "q=secret",
    ):
        text = text_of(page, f"{FIRST}?{query}")
        assert "No checkpoint matches." in text
        assert linked(text, "Show all checkpoints") == FIRST
        assert names(text) == []
        assert ("Of a run that is not there" in text) == query.startswith("run=")


@pytest.mark.usefixtures("small_pages")
def test_the_last_page_may_be_emptied(page: Client, run: TrainingRun) -> None:
    fill(run, 4)
    address = linked(text_of(page, FIRST), "Older checkpoints")
    assert address is not None
    Checkpoint.objects.filter(name="filled-4").delete()
    text = text_of(page, address)
    assert "There are no further checkpoints." in text
    assert linked(text, "First page") == FIRST


@pytest.mark.usefixtures("small_pages")
def test_what_is_deleted_or_kept_leads_back_to_the_same_page(page: Client, run: TrainingRun) -> None:
    fill(run, 40)
    query = f"?run={quote(run.public_id)}&q=filled"
    address = linked(text_of(page, FIRST + query), "Older checkpoints")
    assert address is not None
    text = text_of(page, address)
    assert names(text) == ["filled-4", "filled-5", "filled-6"]
    (back,) = set(re.findall(r'name="next" value="([^"]*)"', text))
    chosen = [f"tinker://{run.public_id}/sampler_weights/filled-{n}" for n in (4, 5)]
    reply = page.post("/checkpoints/delete", {"path": chosen, "next": back})
    assert reply["location"] == address
    of_one = f"/runs/{run.public_id}/checkpoints/sampler_weights/filled-6"
    assert page.post(f"{of_one}/keep", {"seconds": "0", "next": back})["location"] == address
    assert page.post(f"{of_one}/delete", {"next": back})["location"] == address
    assert names(text_of(page, address)) == ["filled-7", "filled-8", "filled-9"]


@pytest.mark.parametrize(
    "query",
    [
        "after=x",
        f"after={signing.dumps(['oldest', 'x', 1], salt='checkpoint-list')}",
        "sort=x",
        "kind=x",
        "q=%00",
    ],
    ids=["no place", "place in another order", "order", "kind", "search"],
)
def test_an_address_that_makes_no_sense_shows_the_first_page(
    page: Client, run: TrainingRun, query: str
) -> None:
    seed.add_checkpoint(run, "end")
    text = text_of(page, f"{FIRST}?{query}")
    assert names(text) == ["end"]
    assert "First page" not in text


def table_of(page: Client, run: TrainingRun) -> tuple[str, str]:
    """Return the page of a run, and of that the part with its checkpoints."""
    text = text_of(page, f"/runs/{run.public_id}/")
    return text, '<section data-part="checkpoints"' + text.partition('<section data-part="checkpoints"')[2]


def version_of(part: str) -> str:
    found = re.match(r'<section data-part="checkpoints" data-version="(\w+)-', part)
    assert found is not None
    return found[1]


def test_a_runs_page_leads_to_all_of_its_checkpoints(page: Client, run: TrainingRun) -> None:
    recipe_seed.make_recipe(run)
    fill(run, 100)
    Checkpoint.objects.filter(name="filled-7").update(is_ephemeral=True)
    text, part = table_of(page, run)
    assert len(names(part)) == 99
    assert "The newest" not in part
    assert "Deletes all 99 checkpoints of the run" in text

    Checkpoint.objects.filter(name="filled-7").update(is_ephemeral=False)
    seed.add_checkpoint(run, "last", age_h=0)
    text, part = table_of(page, run)
    assert len(names(part)) == 100
    assert "The newest 100 are shown." in part
    assert "Deletes all 101 checkpoints of the run" in text
    assert "(101 so far)" in text
    address = linked(part, "All 101 checkpoints")
    assert address is not None
    assert "101 take" in text_of(page, address)

    Checkpoint.objects.filter(name="filled-100").delete()  # one that the page does not show
    _, later = table_of(page, run)
    assert names(later) == names(part)
    assert version_of(later) != version_of(part)


def test_what_stopping_a_run_deletes_is_counted_beyond_what_its_page_shows(
    page: Client, run: TrainingRun
) -> None:
    recipe_seed.make_recipe(run)
    fill(run, 1200)
    text, part = table_of(page, run)
    assert "Deletes all 1\u202f200 checkpoints of the run" in text
    assert linked(part, "All 1\u202f200 checkpoints") is not None


def touched_buffers(rows: Any) -> int:
    """Return how many pages of the database a query reads."""
    plan = json.loads(rows.explain(format="JSON", analyze=True, buffers=True))[0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def test_each_page_reads_as_little_among_many_as_among_few(alice: User, run: TrainingRun) -> None:
    other = seed.make_run(alice, name="other")
    fill(other, 20_000)
    # Those of `run` come last by size and, newest first, by age.
    Checkpoint.objects.filter(run=other).update(size_bytes=100, created_at=timezone.now())
    fill(run, 20_000)
    middle = Checkpoint.objects.get(run=run, name="filled-10001")
    for sort, order in checkpoint_list.ORDERS.items():
        for query in ("", f"run={run.public_id}", "kind=weights"):
            view = checkpoint_list._view_of(QueryDict(f"{query}&sort={sort}"))
            rows, is_searched = checkpoint_list._chosen(alice, view, run if view.run_id else None)
            assert is_searched == ((query, sort) == ("kind=weights", "largest"))
            behind = rows.filter(checkpoint_list._beyond(order, checkpoint_list._place_of(middle, order)))
            for part in (rows, behind):
                if not is_searched:
                    assert touched_buffers(checkpoint_list._narrowed(part, view)[:201]) < 700, (query, sort)
    assert tallies.total_of(alice, tallies.Kind.CHECKPOINTS).num == 40_000
