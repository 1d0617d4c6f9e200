"""The playground's page: which weights it offers, and what it tells of other people's."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from runs.models import Checkpoint, User
from runs.pages import playground
from tests.pages import seed
from tests.pages.read_rows import counting

pytestmark = pytest.mark.django_db


def groups_of(page: Client) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = page.get("/playground/weights.json").json()["groups"]
    return groups


def test_another_persons_published_weights_are_named_by_their_path(page: Client, bob: User) -> None:
    theirs = seed.make_run(bob, name="bob's secret")
    checkpoint = seed.add_checkpoint(theirs, "final", step=1)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_public=True)
    path = f"tinker://{theirs.public_id}/weights/final"
    html = page.get(f"/playground/?checkpoint={path}").content.decode()
    assert path in html
    assert "secret" not in html


def test_only_the_newest_of_all_are_read(page: Client, alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playground, "MAX_RUNS", 2)
    monkeypatch.setattr(playground, "MAX_PER_RUN", 3)
    for number, num_saved in enumerate((1, 2, 9)):
        run = seed.make_run(alice, name=f"run {number}")
        for step in range(num_saved):
            seed.add_checkpoint(run, f"step-{step}", step=step, age_h=10 - 3 * number - step / 100)
    with counting(Checkpoint) as read:
        shown = {group["label"]: len(group["choices"]) for group in groups_of(page)[1:]}
    assert read.num_rows == 6
    assert shown == {"run 2": 3}


def test_the_runs_that_saved_last_come_first_with_their_newest(page: Client, alice: User) -> None:
    for number, age_h in enumerate((3.0, 1.0, 2.0)):
        run = seed.make_run(alice, name=f"run {number}")
        seed.add_checkpoint(run, "older", step=1, age_h=age_h + 5)
        seed.add_checkpoint(run, "newer", step=2, age_h=age_h)
    shown = [(group["label"], [one["label"] for one in group["choices"]]) for group in groups_of(page)]
    saved = ["newer (step 2)", "older (step 1)"]
    assert shown[1:] == [("run 1", saved), ("run 2", saved), ("run 0", saved)]
