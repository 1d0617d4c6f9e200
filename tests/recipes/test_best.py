"""The best weights of a run: they stay whatever comes after, and only weights that are there count."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runs.models import Checkpoint, Evaluation, Operation, Recipe, User
from runs.schemas.recipes import Changes
from runs.services import checkpoints, recipe_rows, recipe_steps, recipes
from runs.services.recipe_rows import State
from tests.pages import recipe_seed, seed
from tests.recipes.conftest import Staff, ended
from tests.recipes.test_loop import adapter_digest

Begin = Callable[..., Recipe]
LOSSES = {10: 2.0, 20: 1.0, 30: 1.2, 40: 1.5}


@pytest.fixture
def recipe(alice: User) -> Recipe:
    """Return a running recipe whose automatic checkpoints are all measured; that of step 20 is the best."""
    run = seed.make_run(alice, step=50)
    found = recipe_seed.make_recipe(run, next_seq=run.applied_seq + 1, best_step=20)
    recipe_seed.add_evaluations(run, list(LOSSES))
    for step, loss in LOSSES.items():
        Evaluation.objects.filter(run=run, step=step).update(loss=loss)
        seed.add_checkpoint(run, f"step-{step:06d}", step=step)
    return found


def kept(recipe: Recipe) -> list[str]:
    names = Checkpoint.objects.filter(run=recipe.run, is_ephemeral=False).values_list("name", flat=True)
    return sorted(names)


def lose(recipe: Recipe, name: str) -> None:
    checkpoints.delete(Checkpoint.objects.get(run=recipe.run, name=name))


def look(recipe: Recipe, *, keep: int = 9) -> None:
    """Look after the run as the loop does once the worker has done something."""
    recipe_steps.watch(recipe)
    recipe_steps.prune(recipe, keep=keep)
    recipe.refresh_from_db()


def test_a_run_that_gets_worse_when_it_is_extended_keeps_its_best_weights(begin: Begin) -> None:
    recipe = ended(begin(num_steps=4, save_every=1, keep_checkpoints=1))
    assert (recipe.best_step, kept(recipe)) == (4, ["final", "step-000003"])
    best = adapter_digest(recipe)
    seed.add_checkpoint(recipe.run, "step-000004", step=4)  # as a step that failed has left it before a retry

    recipes.extend(recipe, 2)
    recipes.change(recipe, Changes(learning_rate=0.9, schedule="constant"))
    recipe = ended(recipe)

    assert (recipe.state, recipe.best_step) == (State.FINISHED, 4)
    assert kept(recipe) == ["final", "step-000004"]
    assert adapter_digest(recipe, "step-000004") == best != adapter_digest(recipe)


def test_a_run_is_extended_before_its_first_step_without_a_checkpoint(begin: Begin, worker: Staff) -> None:
    worker.stop()
    recipe = begin(num_steps=4)
    recipes.stop(recipe, keep=True)
    recipe = ended(recipe)

    recipes.extend(recipe, 2)

    assert not Operation.objects.filter(run=recipe.run, kind="save_weights").exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_of_the_weights_that_are_there_is_kept(recipe: Recipe, keep: int) -> None:
    lose(recipe, "step-000020")

    look(recipe, keep=keep)

    assert recipe.best_step == 30
    assert kept(recipe) == ["step-000030", "step-000040"][:keep]


def test_without_any_measured_weights_no_step_is_the_best(recipe: Recipe) -> None:
    for step in LOSSES:
        lose(recipe, f"step-{step:06d}")

    look(recipe, keep=1)

    assert recipe.best_step is None


@pytest.mark.parametrize(("state", "best"), [("queued", 50), ("failed", 20)])
def test_weights_that_could_not_be_saved_are_not_the_best(recipe: Recipe, state: str, best: int) -> None:
    recipe_seed.add_evaluations(recipe.run, [50])
    measured = Evaluation.objects.filter(run=recipe.run, step=50)
    measured.update(loss=0.5)
    with recipe_rows.locked(recipe) as row:
        recipe_rows.submit_save(row, name="step-000050")
    Operation.objects.filter(run=recipe.run, kind="save_weights").update(state=state)
    Recipe.objects.filter(pk=recipe.pk).update(best_step=50)
    recipe.refresh_from_db()

    look(recipe, keep=2)

    assert recipe.best_step == best
    assert kept(recipe) == ["step-000020", "step-000040"]  # the best of those that are there, whatever comes


def test_weights_that_are_saved_only_later_are_the_best_then(recipe: Recipe) -> None:
    recipe_seed.add_evaluations(recipe.run, [50])
    Evaluation.objects.filter(run=recipe.run, step=50).update(loss=0.5)
    with recipe_rows.locked(recipe) as row:
        recipe.run.applied_seq = recipe_rows.submit_save(row, name="final")
    Operation.objects.filter(run=recipe.run, kind="save_weights").update(state="done")
    seed.add_checkpoint(recipe.run, "final", step=50)

    look(recipe)

    assert recipe.best_step == 50


@pytest.mark.parametrize(("next_step", "best"), [(50, 50), (60, 20)])
def test_the_last_checkpoint_is_the_best_until_the_run_goes_on(
    recipe: Recipe, next_step: int, best: int
) -> None:
    recipe_seed.add_evaluations(recipe.run, [50])
    Evaluation.objects.filter(run=recipe.run, step=50).update(loss=0.5)
    seed.add_checkpoint(recipe.run, "final", step=50)
    Recipe.objects.filter(pk=recipe.pk).update(best_step=50, next_step=next_step)
    recipe.refresh_from_db()

    look(recipe, keep=4)

    assert recipe.best_step == best


def test_a_step_that_was_skipped_does_not_hide_the_best_weights(recipe: Recipe) -> None:
    """The worker counts no step whose gradient was not finite, the recipe counts it."""
    for saved in Checkpoint.objects.filter(run=recipe.run):
        Checkpoint.objects.filter(pk=saved.pk).update(step=saved.step - 1)
    Evaluation.objects.filter(run=recipe.run, step=30).update(loss=None)

    look(recipe, keep=1)

    assert recipe.best_step == 20
    assert kept(recipe) == ["step-000020", "step-000030"]
