"""Runs that are deleted while the loop looks after them, and runs that end, or go, without a worker."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection
from django.db.models.functions import Now

from runs.exceptions import NotFound
from runs.models import Operation, Recipe, TrainingRun, User
from runs.recipes.loop import RecipeLoop
from runs.services import recipes, run_deletion
from runs.services.recipe_rows import State
from tests.pages import recipe_seed, seed
from tests.services import rows
from tests.services.hand_worker import HandWorker
from tests.services.races import race


@contextmanager
def deleted_before(run: TrainingRun, number: int) -> Iterator[list[str]]:
    """Have somebody delete the run before the query of this number that holds nothing of it; yields those before."""
    passed: list[str] = []

    def execute(do: Any, query: str, params: Any, many: bool, context: Any) -> Any:
        if "FOR UPDATE" in query or not connection.in_atomic_block:
            passed.append(query)
            if len(passed) == number:
                race([lambda: run_deletion.delete(run)])
        return do(query, params, many, context)

    with connection.execute_wrapper(execute):
        yield passed


def make_run(alice: User, *, state: State) -> Recipe:
    """Make a run that no worker has any more, all of whose operations are done."""
    run = seed.make_run(alice, source="browser", applied_seq=6, step=3)
    recipe = recipe_seed.make_recipe(run, state=state, next_seq=7)
    Recipe.objects.filter(pk=recipe.pk).update(watched_seq=5)
    return recipe


@pytest.mark.parametrize("state", [State.STOPPING, State.DISCARDING])
def test_a_run_that_is_deleted_at_any_point_of_a_turn_holds_up_no_other(
    transactional_db: None, alice: User, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    loop, other = RecipeLoop(), make_run(alice, state=State.PAUSED)
    for number in range(1, 100):
        recipe = make_run(alice, state=state)
        Recipe.objects.filter(pk=other.pk).update(watched_seq=5, queued_at=Now())  # comes after it
        with deleted_before(recipe.run, number) as passed:
            loop.turn()
        other.refresh_from_db()
        assert other.watched_seq == 6, passed
        if len(passed) < number:
            break
        assert not TrainingRun.objects.filter(pk=recipe.run_id).exists(), passed
    assert number > 5
    assert "cannot go on" not in caplog.text


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("is_paused", [False, True])
def test_a_run_whose_base_model_is_never_loaded_is_stopped_and_deleted(
    transactional_db: None, alice: User, is_paused: bool, is_kept: bool
) -> None:
    worker = HandWorker()
    rows.report_base_model(worker.row)
    run = rows.make_run(alice)
    TrainingRun.objects.filter(pk=run.pk).update(source=TrainingRun.Source.BROWSER)
    rows.report_base_model(worker.row, error="its folder is not there")
    recipe = recipe_seed.make_recipe(
        run, state=State.PREPARING, started_at=None, preparation={}, next_seq=1, watched_seq=0
    )
    if is_paused:
        recipes.pause(recipe)
    recipes.stop(recipe, keep=is_kept)

    RecipeLoop().turn()

    recipe.refresh_from_db()
    assert (recipe.state, recipe.error) == (State.STOPPED if is_kept else State.DISCARDED, "")
    assert run.operations.filter(state="queued").exists()
    run_deletion.delete(run)
    assert not TrainingRun.objects.exists()
    assert not Operation.objects.exists()


def test_steering_a_run_that_is_deleted_just_then_finds_none(transactional_db: None, alice: User) -> None:
    recipe = make_run(alice, state=State.FAILED)
    with deleted_before(recipe.run, 1), pytest.raises(NotFound, match="was deleted just now"):
        recipes.retry(recipe)
