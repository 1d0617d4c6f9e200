"""Data that takes long, or cannot be there yet, holds up no other run.

Each test cuts rows at lengths of its own, so that the tokens are in nobody's cache.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from django.conf import settings as configured
from pytest_django.fixtures import Settings

from runs.models import Recipe
from runs.recipes import sft, tokens
from runs.recipes.batches import BatchPlan
from runs.recipes.loop import RecipeLoop
from runs.recipes.materials import Materials
from runs.recipes.rendering import renderer_of
from runs.services import base_models, recipe_status, recipes
from runs.services.recipe_rows import State
from tests.recipes.conftest import ENDED, TINY, Staff, ended, questions, turn_until
from tests.worker.conftest import wait_for

Begin = Callable[..., Recipe]
LATER = "test/later"
DEADLINE_S = 60.0


@contextmanager
def made_elsewhere(recipe: Recipe) -> Iterator[None]:
    """Hold a recipe's tokens as another process does that makes them."""
    config = recipe.config
    key = tokens.key_of(
        recipe.dataset_version,
        renderer_of(config["base_model"]),
        train_on=config["train_on"],
        max_length=config["max_length"],
    )
    lock = Path(configured.DATA_DIR) / "cache" / "tokens" / "locks" / key[:2]
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def states(*started: Recipe) -> list[str]:
    return [Recipe.objects.get(pk=recipe.pk).state for recipe in started]


def turned(loop: RecipeLoop, condition: Callable[[], Any], *, what: str) -> None:
    def look() -> Any:
        loop.turn()
        return condition()

    wait_for(look, what=what, deadline_s=DEADLINE_S)


def test_a_run_on_a_model_that_no_worker_has_loaded_holds_up_no_other(
    begin: Begin, settings: Settings
) -> None:
    settings.BASE_MODELS = {**settings.BASE_MODELS, LATER: str(TINY)}
    base_models._cache = None
    early = [begin(base_model=LATER) for _ in range(6)]
    assert recipe_status.status_of(early[0]).phase == f"waiting until base model {LATER} is loaded"
    loop = RecipeLoop()
    other = begin(num_steps=2)

    turned(loop, lambda: states(other)[0] in ENDED, what="the other run's end")

    assert states(other) == [State.FINISHED]
    assert set(states(*early)) == {State.PREPARING}


def test_a_run_whose_model_comes_later_goes_on_then(begin: Begin, settings: Settings, worker: Staff) -> None:
    settings.BASE_MODELS = {**settings.BASE_MODELS, LATER: str(TINY)}
    base_models._cache = None
    early = begin(base_model=LATER, num_steps=2)
    loop = RecipeLoop()
    loop.turn()
    worker.stop()
    worker.start()

    turned(loop, lambda: states(early)[0] in ENDED, what="the end")

    assert states(early) == [State.FINISHED]


def test_tokens_in_the_cache_wait_behind_nothing_that_has_to_be_made(begin: Begin) -> None:
    ended(begin(num_steps=1, max_length=71))
    slow = [begin(max_length=length) for length in (72, 73, 74)]
    with made_elsewhere(slow[0]), made_elsewhere(slow[1]), made_elsewhere(slow[2]):
        loop = RecipeLoop()
        loop.turn()
        cached = begin(num_steps=2, max_length=71)
        turned(loop, lambda: states(cached)[0] in ENDED, what="the end of the run whose tokens are there")
        assert states(cached, *slow) == [State.FINISHED, *[State.PREPARING] * 3]
        for recipe in slow:
            recipes.stop(recipe, keep=False)
        loop.turn()


def test_stopping_a_run_ends_the_making_of_its_tokens(begin: Begin) -> None:
    slow = [begin(max_length=length) for length in (82, 83, 84)]
    with made_elsewhere(slow[0]), made_elsewhere(slow[1]), made_elsewhere(slow[2]):
        loop = RecipeLoop()
        for _ in range(2):
            loop.turn()
        for recipe in slow:
            recipes.stop(recipe, keep=False)
        other = begin(num_steps=2, max_length=85)
        turned(loop, lambda: states(other)[0] in ENDED, what="the end of a run that came later")
    assert states(other) == [State.FINISHED]


def test_runs_on_the_same_tokens_take_one_place_while_they_are_made(
    begin: Begin, add_dataset: Callable[..., Any]
) -> None:
    slow = [begin(num_steps=2, max_length=86) for _ in range(4)]
    another = add_dataset(questions(30, start=900), name="another")
    loop = RecipeLoop()
    with made_elsewhere(slow[0]):
        loop.turn()
        other = begin(num_steps=2, dataset=another.dataset.public_id)
        turned(loop, lambda: states(other)[0] in ENDED, what="the end of a run on another dataset")
        assert set(states(*slow)) == {State.PREPARING}
    turned(loop, lambda: set(states(*slow)) <= set(ENDED), what="the end of the others")
    assert set(states(*slow)) == {State.FINISHED}


def test_a_queued_run_is_not_measured_before_its_turn(begin: Begin, settings: Settings) -> None:
    settings.CONCURRENT_RUNS = 1
    first = turn_until(begin(num_steps=4_000), lambda row: row.state == State.RUNNING, what="the first run")
    loop = RecipeLoop()
    second = begin()
    turned(loop, lambda: states(second) == [State.QUEUED], what="the second waits")
    turned(loop, lambda: loop.materials.get(second), what="its data is there")

    with calls_of(sft.validation_forwards.__code__) as calls:
        loop.turn()
    assert (states(second), calls) == ([State.QUEUED], [])

    recipes.stop(Recipe.objects.get(pk=first.pk), keep=False)
    with calls_of(sft.validation_forwards.__code__) as calls:
        turned(loop, lambda: states(second) == [State.RUNNING], what="its turn")
    assert calls
    recipes.stop(Recipe.objects.get(pk=second.pk), keep=False)


def test_batches_by_tokens_are_found_beside_the_loop(begin: Begin) -> None:
    loop = RecipeLoop()
    recipe = begin(num_steps=None, num_epochs=900, batch_tokens=64)
    walk = BatchPlan._extend.__code__
    with calls_of(walk) as calls:
        turned(loop, lambda: states(recipe) == [State.QUEUED], what="its end is known")
    recipe.refresh_from_db()
    assert calls == []
    assert recipe.num_steps > 9_000

    Recipe.objects.filter(pk=recipe.pk).update(next_step=9_000)
    recipe.refresh_from_db()
    started_again = Materials()
    material = wait_for(lambda: started_again.get(recipe), what="its data", deadline_s=DEADLINE_S)
    with calls_of(walk) as calls:
        material.plan.rows_of(9_000)
    assert len(calls) == 1
    recipes.stop(recipe, keep=False)


@contextmanager
def calls_of(code: CodeType) -> Iterator[list[str]]:
    """Note each call of a function by this thread."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is code:
            calls.append(code.co_name)

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)
