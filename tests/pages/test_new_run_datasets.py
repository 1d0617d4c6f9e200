"""The datasets that the form of a new run offers, however many versions there are."""

from __future__ import annotations

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from tokenizers import Tokenizer

from runs.models import Dataset, DatasetVersion, User
from tests.pages.new_run_form import NEW, filled, make_dataset, opened, ref, send

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _base_model(tokenizer: Tokenizer) -> None:
    """Have a base model in all tests."""


def add_versions(dataset: Dataset, num_versions: int) -> None:
    """Enter as many further versions, all ready."""
    DatasetVersion.objects.bulk_create(
        DatasetVersion(
            dataset=dataset,
            number=number,
            digest=f"{dataset.pk:032x}{number:032x}",
            filename="rows.jsonl",
            size_bytes=1,
            directory=f"datasets/{dataset.pk}-{number}",
            state=DatasetVersion.State.READY,
            kind=DatasetVersion.Kind.CHAT,
            num_rows=7,
        )
        for number in range(2, 2 + num_versions)
    )


def test_many_versions_of_one_dataset_hide_no_other(page: Client, alice: User) -> None:
    old, many = make_dataset(alice, number=1), make_dataset(alice, number=2)
    add_versions(many.dataset, 520)
    html = page.get(NEW).content.decode()
    assert html.count(f'value="{ref(old)}"') == 2  # to train on, to validate on
    assert html.count(f'value="{many.dataset.public_id}@521"') == 2
    assert html.count('<option value="ds-') == 4
    for number in (1, 3):
        chosen = f"{many.dataset.public_id}@{number}"
        assert opened(page, f"?dataset={chosen}")["dataset"] == [chosen]


def test_the_form_reads_no_report(page: Client, alice: User) -> None:
    make_dataset(alice)
    with CaptureQueriesContext(connection) as queries:
        page.get(NEW)
    assert queries.captured_queries
    assert not [one["sql"] for one in queries if '"report"' in one["sql"]]


def test_another_persons_version_is_not_offered_by_naming_it(page: Client, alice: User, bob: User) -> None:
    theirs, own = make_dataset(bob, number=9), make_dataset(alice)
    form = {"dataset": [ref(theirs)], "validation.datasets": [ref(theirs), ref(own), "ds-x@1", "@", "\0"]}
    reply = page.post(NEW, form)
    assert reply.status_code == 422
    html = reply.content.decode()
    assert f'value="{ref(theirs)}"' not in html
    assert html.count(f'<option value="{ref(own)}" selected>') == 1


def test_an_open_form_learns_of_what_becomes_ready(page: Client, alice: User, bob: User) -> None:
    first = make_dataset(alice)
    form = filled(page, dataset=ref(first))
    before = send(page, form, action="preview")
    assert f'data-offer="{before["offer"]}"' in page.get(NEW).content.decode()
    fresh = make_dataset(alice, number=2)
    DatasetVersion.objects.filter(pk=fresh.pk).update(state="checking")
    make_dataset(bob, number=3)
    during = send(page, form, action="preview")
    assert (before["is_growing"], during["is_growing"]) == (False, True)
    assert during["offer"] == before["offer"]
    DatasetVersion.objects.filter(pk=fresh.pk).update(state="ready")
    after = send(page, form, action="preview")
    assert after["offer"] != before["offer"]
    assert after["is_growing"] is False
