"""The head of a run that needs no code, in words."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from runs.models import Recipe, TrainingRun, User
from runs.services import recipe_facts, run_rows
from runs.services.recipe_facts import Progress
from tests.pages import recipe_seed, seed

State = Recipe.State


def progress_of(run: TrainingRun) -> Progress:
    facts = run_rows.facts_of(run_rows.with_facts(run.owner).get(pk=run.pk))
    assert facts.progress is not None
    return facts.progress


@pytest.fixture
def user(db: None) -> User:
    return seed.make_user("alice")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.2, 0.9, "about 1 s"),
        (31, 47.2, "31 to 48 s"),
        (200, 340, "4 to 6 min"),
        (230, 239, "about 4 min"),
        (4000, 7300, "1.1 to 2.0 h"),
        (40_000, 80_000, "12 to 23 h"),
        (100_000, 200_000, "1.2 to 2.3 d"),
    ],
)
def test_a_range_is_told_in_one_unit(low: float, high: float, expected: str) -> None:
    assert recipe_facts.time_range(low, high) == expected


def test_a_waiting_run_tells_its_place_and_when_it_starts(user: User, settings: Any) -> None:
    settings.CONCURRENT_RUNS = 1
    running = seed.make_run(user, worker=seed.make_worker())
    seed.add_values(running, seed.curve(60), step_s=2.0)
    recipe_seed.make_recipe(running, num_steps=200)
    now = timezone.now()
    first, second = seed.make_run(user), seed.make_run(user)
    for run, age_min in ((first, 5), (second, 4)):
        recipe_seed.make_recipe(
            run, state=State.QUEUED, started_at=None, queued_at=now - timedelta(minutes=age_min)
        )
    # 140 steps of 2 s are left, give or take a tenth.
    assert progress_of(first).phase == "Queued, position 1, starts in about 6 min"
    assert progress_of(second).phase == "Queued, position 2"
    assert progress_of(first).percent is None
    assert progress_of(running).time_left == "5 to 6 min left"


def test_a_run_without_a_worker_says_so(user: User) -> None:
    run = seed.make_run(user)
    seed.add_values(run, seed.curve(10))
    recipe_seed.make_recipe(run)
    seed.add_operations(run)
    assert progress_of(run).phase == "Waiting for a GPU worker, training: step 10 of 400"
    assert progress_of(run).tone == "warn"


def test_a_run_of_a_client_has_no_progress(user: User) -> None:
    run = seed.make_run(user)
    assert run_rows.facts_of(run_rows.with_facts(user).get(pk=run.pk)).progress is None


def test_the_best_loss_is_that_of_the_best_step(user: User) -> None:
    run = seed.make_run(user)
    recipe_seed.make_recipe(run, best_step=20)
    recipe_seed.add_evaluations(run, [0, 10, 20, 30])
    progress = progress_of(run)
    assert progress.best_step == 20
    assert progress.best_loss is not None
    assert progress.validation_loss is not None
    assert progress.best_loss > progress.validation_loss
