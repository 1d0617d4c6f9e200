"""Which runs use a dataset: counted in full, named in part."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from runs.models import Dataset, DatasetVersion, TrainingRun, User
from tests.pages import recipe_seed, seed
from tests.pages.read_rows import counting

pytestmark = pytest.mark.django_db
NUM_TRAINED = 23
NUM_MEASURED = 2


@pytest.fixture
def dataset(alice: User) -> Dataset:
    """Return a dataset that 23 runs train on, some of which are measured on it too, and 2 are only measured on."""
    first = seed.make_run(alice, name="run 0")
    version = recipe_seed.make_recipe(first).dataset_version
    DatasetVersion.objects.filter(pk=version.pk).update(state="checking")  # it has no files
    for number in range(1, NUM_TRAINED):
        run = seed.make_run(alice, name=f"run {number}", session=first.session)
        recipe = recipe_seed.make_recipe(run)
        if number < 4:
            recipe.validation_versions.add(version)
    other = recipe_seed.make_dataset(alice, name="other", number=0x77)
    for number in range(NUM_MEASURED):
        run = seed.make_run(alice, name=f"only measured {number}", session=first.session)
        recipe = recipe_seed.make_recipe(run)
        recipe.dataset_version = other
        recipe.save(update_fields=["dataset_version"])
        recipe.validation_versions.add(version)
    return version.dataset


def test_the_list_counts_each_run_once(page: Client, dataset: Dataset) -> None:
    text = page.get("/datasets/").content.decode()
    counts = [cell.partition("<")[0] for cell in text.split('class="number cell-runs">')[1:]]
    names = [cell.partition("<")[0] for cell in text.split("<bdi>")[1:]]
    shown = dict(zip([name for name in names if name in ("other", dataset.name)], counts, strict=True))
    assert shown == {dataset.name: str(NUM_TRAINED + NUM_MEASURED), "other": str(NUM_MEASURED)}


def test_the_page_names_the_newest_runs_and_how_many_more_there_are(page: Client, dataset: Dataset) -> None:
    oldest = TrainingRun.objects.get(name="run 5")
    TrainingRun.objects.filter(pk=oldest.pk).update(created_at=timezone.now() - timedelta(days=9))
    with counting(TrainingRun) as read:
        text = page.get(f"/datasets/{dataset.public_id}/").content.decode()
    assert read.num_rows == 20
    users, dialog = text.split('id="users-title"')[1].split('id="delete-dialog"')
    assert users.count("<li><a") == 20
    assert "and 5 more" in users
    assert "only measured 1" in users
    assert "run 5<" not in users
    assert "25 runs use it" in dialog
    assert "and 5 more" in dialog


def test_a_refusal_to_delete_names_five(page: Client, dataset: Dataset) -> None:
    with counting(TrainingRun) as read:
        reply = page.post(f"/datasets/{dataset.public_id}/delete", headers={"accept": "application/json"})
    assert read.num_rows == 5
    assert reply.status_code == 422
    assert reply.json()["detail"].endswith(" and 20 more; delete those runs first")
    assert Dataset.objects.filter(pk=dataset.pk).exists()
