"""Rows of a dataset as they are trained on: marked, cut, paged, and never more than a page can bear."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import pytest
from django.test import Client
from pytest_django.fixtures import Settings

from runs.models import DatasetVersion, User
from runs.pages import dataset_preview
from runs.services import base_models
from tests.pages.dataset_seed import HOSTILE, add_checked, add_talk, chat_line, chats
from tests.pages.test_datasets import page_of

pytestmark = pytest.mark.django_db


def rows_in(text: str) -> list[str]:
    return text.split('<li class="row-view')[1:]


@pytest.fixture
def talk(alice: User) -> DatasetVersion:
    """Return a dataset with one conversation of two questions."""
    return add_talk(alice)


def spans_of(row: str) -> list[tuple[str, str]]:
    """Return what a row shows: the kind of each piece, or `cut here`, with its text."""
    spans = []
    for part in row.split('<span class="')[1:]:
        kind, _, rest = part.partition('">')
        if kind.startswith("piece ") or kind == "cut-line":
            spans.append((kind.removeprefix("piece "), rest.partition("</span>")[0]))
    return spans


def shown(page: Client, version: DatasetVersion, **query: Any) -> list[tuple[str, str]]:
    return spans_of(rows_in(page_of(page, version, base_model="mintweb/tiny", **query))[0])


def trained(spans: list[tuple[str, str]]) -> str:
    return "".join(text for kind, text in spans if kind.startswith("piece-trained"))


def test_what_is_trained_on_is_marked(page: Client, talk: DatasetVersion) -> None:
    answers = trained(shown(page, talk, train_on="assistant"))
    assert "Alpha." in answers
    assert "Omega." in answers
    assert "First?" not in answers
    last = trained(shown(page, talk, train_on="last"))
    assert "Alpha." not in last
    assert "Omega." in last
    everything = trained(shown(page, talk, train_on="all"))
    assert "First?" in everything
    spans = shown(page, talk)
    assert any(kind == "piece-masked" and "First?" in text for kind, text in spans)
    assert any("piece-special" in kind for kind, _ in spans)


def test_the_cut_is_drawn_where_it_is(page: Client, talk: DatasetVersion) -> None:
    whole = shown(page, talk)
    assert not [kind for kind, _ in whole if kind == "cut-line"]
    spans = shown(page, talk, max_length=12)
    place = [kind for kind, _ in spans].index("cut-line")
    assert spans[place][1] == "cut here, at 12 tokens"
    assert all(not kind.startswith("piece-cut") for kind, _ in spans[:place])
    assert all(kind.startswith("piece-cut") for kind, _ in spans[place + 1 :])
    kept = [text for kind, text in spans if kind != "cut-line"]
    assert "".join(kept) == "".join(text for _, text in whole)
    text = rows_in(page_of(page, talk, base_model="mintweb/tiny", max_length=12))[0]
    assert "cut off</span>" in text


def test_the_share_of_rows_that_are_cut_is_said(page: Client, alice: User) -> None:
    long = "".join(chat_line(f"Count {n}.", "one two three " * 100) for n in range(3))
    version = add_checked(alice, chats(9) + long)
    said = {
        limit: page_of(page, version, base_model="mintweb/tiny", max_length=limit) for limit in (8, 150, 9000)
    }
    assert "about 100 % of the rows are longer than 8 tokens" in said[8]
    assert "about 25 % of the rows are longer than 150 tokens" in said[150]
    assert "no row is longer than 9\u202f000 tokens" in said[9000]


def test_rows_are_paged(page: Client, alice: User) -> None:
    version = add_checked(alice, chats(12))
    text = page_of(page, version, row=6, train_on="last", max_length=99)
    assert [row.partition("Row ")[2].partition("<")[0] for row in rows_in(text)] == ["6", "7", "8", "9", "10"]
    assert "train_on=last&amp;max_length=99&amp;row=11#rows" in text
    assert "row=1#rows" in text
    last = page_of(page, version, row=999)
    assert len(rows_in(last)) == 1
    assert "Next rows" not in last
    assert "Previous rows" not in page_of(page, version)


@pytest.mark.parametrize("query", [{"row": "-1"}, {"row": "x"}, {"max_length": "1e9"}, {"train_on": "none"}])
def test_an_odd_address_shows_the_first_rows(
    page: Client, talk: DatasetVersion, query: dict[str, str]
) -> None:
    assert "Row 1" in rows_in(page_of(page, talk, base_model="nothing", **query))[0]


def test_a_row_too_long_for_the_page_is_shown_in_part(
    page: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_preview, "_MAX_SHOWN_CHARS", 100)
    version = add_checked(alice, chat_line("Say a.", "a" * 5000) + chat_line("Say b.", "b" * 20_000))
    monkeypatch.setattr(dataset_preview, "_MAX_ROW_BYTES", 10_000)
    first, second = rows_in(page_of(page, version, base_model="mintweb/tiny"))
    assert "more characters are not shown" in first
    assert first.count("a") < 500
    assert "too many to render here" in second


def test_rows_that_cannot_be_trained_on_are_shown_as_they_are(page: Client, alice: User) -> None:
    row = {"prompt": "Which?", "chosen": HOSTILE, "rejected": "no"}
    version = add_checked(alice, json.dumps(row) + "\n")
    assert version.kind == "preference"
    text = page_of(page, version)
    assert "supervised training takes messages" in text
    assert escape(HOSTILE) in text
    assert HOSTILE not in text
    assert "New run with this dataset" not in text


def test_without_a_tokenizer_rows_are_shown_as_they_are(
    page: Client, talk: DatasetVersion, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.BASE_MODELS = {"far/away": "far/away"}
    monkeypatch.setattr(base_models, "_cache", None)
    text = page_of(page, talk)
    assert "are not on this machine yet" in text
    assert "Alpha." in text
