"""Which recipes the loop has to look after, and that it finds them without a look at all the others."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from runs.models import Checkpoint, Recipe, TrainingRun, User
from runs.services import active_recipes
from runs.services.recipe_rows import State
from tests.pages import recipe_seed, seed

pytestmark = pytest.mark.django_db


@pytest.fixture
def alice() -> User:
    """Return a user."""
    return User.objects.create(username="alice")


def add_sampled_weights(run: TrainingRun) -> None:
    checkpoint = seed.add_checkpoint(run, "sample", kind="sampler_weights")
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_ephemeral=True, seq=1)


def add_recipe(user: User, state: str, *, has_weights: bool, ended_days: int | None = None) -> Recipe:
    run = seed.make_run(user, step=30)
    TrainingRun.objects.filter(pk=run.pk).update(applied_seq=30)
    if has_weights:
        add_sampled_weights(run)
    ended_at = None if ended_days is None else timezone.now() - timedelta(days=ended_days)
    return recipe_seed.make_recipe(run, state=state, ended_at=ended_at, next_seq=40, watched_seq=30)


def test_a_recipe_that_rests_is_looked_after_while_something_is_left(alice: User) -> None:
    wanted = [
        add_recipe(alice, State.RUNNING, has_weights=False),
        add_recipe(alice, State.PAUSED, has_weights=True),
        add_recipe(alice, State.FAILED, has_weights=True, ended_days=6),
        add_recipe(alice, State.QUEUED, has_weights=False),
    ]
    add_recipe(alice, State.PAUSED, has_weights=False)
    add_recipe(alice, State.STOPPED, has_weights=False, ended_days=0)
    add_recipe(alice, State.FINISHED, has_weights=True, ended_days=8)
    for days, recipe in enumerate(wanted):
        Recipe.objects.filter(pk=recipe.pk).update(queued_at=timezone.now() + timedelta(days=days))

    assert active_recipes.find() == wanted


def test_recipes_that_ended_long_ago_are_not_looked_at(alice: User) -> None:
    recipe = add_recipe(alice, State.FINISHED, has_weights=False, ended_days=30)
    runs = [copied(recipe.run, public_id=f"copy-{number}", model_seq_id=number) for number in range(1, 5_000)]
    TrainingRun.objects.bulk_create(runs)
    Recipe.objects.bulk_create([copied(recipe, run_id=run.pk) for run in runs])
    add_recipe(alice, State.RUNNING, has_weights=True)
    with CaptureQueriesContext(connection) as queries:
        assert len(active_recipes.find()) == 1
    (query,) = queries
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE runs_recipe, runs_trainingrun, runs_checkpoint")
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query['sql']}")
        (((plan,),),) = cursor.fetchall()

    assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 100


def copied(row: Any, **changes: Any) -> Any:
    """Return a row like another one that is not in the database yet."""
    values = {field.attname: getattr(row, field.attname) for field in row._meta.concrete_fields}
    return type(row)(**{**values, "id": None, **changes})
