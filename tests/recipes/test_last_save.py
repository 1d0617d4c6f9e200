"""The last checkpoint of a run that ends: what the server cannot save is saved again, and until then it has not ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runs.models import Checkpoint, Operation, Recipe, RunEvent, User
from runs.services import recipe_steps, recipes, run_rows
from runs.services.recipe_rows import State
from tests.no_room import no_room
from tests.pages import recipe_seed, seed
from tests.recipes.conftest import Staff, ended, turn_until
from tests.recipes.test_retry import add_operation

Begin = Callable[..., Recipe]
Kind = Operation.Kind
NO_ROOM_BYTES = 8_192


def about_to_end(begin: Begin, worker: Staff, *, is_stopped: bool) -> Recipe:
    """Return a run whose last save is in the log and not done yet: its worker is away."""
    if is_stopped:
        recipe = turn_until(begin(num_steps=400), lambda row: row.run.step >= 2, what="some steps")
        worker.stop()
        recipes.stop(recipe, keep=True)
    else:
        worker.stop()
        recipe = begin(num_steps=2, save_every=2, validation={"share": 0})
        recipe = turn_until(recipe, lambda row: row.state == State.FINISHING, what="all steps are submitted")
    return recipe


def failed_saves(recipe: Recipe) -> list[Operation]:
    saves = Operation.objects.filter(run=recipe.run, kind=Kind.SAVE_WEIGHTS, state="failed")
    return list(saves.order_by("seq"))


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_last_checkpoint_without_room_is_saved_once_there_is(
    begin: Begin, worker: Staff, is_stopped: bool
) -> None:
    recipe = about_to_end(begin, worker, is_stopped=is_stopped)
    ending = recipe.state
    with no_room(limit_bytes=NO_ROOM_BYTES):
        worker.start()
        recipe = turn_until(recipe, lambda row: len(failed_saves(row)) >= 2, what="the save is tried again")
        recipe = turn_until(recipe, lambda row: row.run.held_up, what="the disk is found full")
        facts = run_rows.facts_of(run_rows.with_facts(recipe.run.owner).get(pk=recipe.run_id))
    assert recipe.state == ending
    assert facts.row.status == "held up"
    assert facts.reason.startswith("the checkpoint cannot be written: ")
    assert facts.reason.count("cannot be written") == 1
    assert facts.reason.endswith(
        "the run's last checkpoint is tried again until it is saved, and nothing is lost"
    )

    recipe = ended(recipe)

    assert (recipe.state, recipe.error) == (State.STOPPED if is_stopped else State.FINISHED, "")
    assert (recipe.run.held_up, recipe.run.held_up_at) == ("", None)
    saved = Checkpoint.objects.get(run=recipe.run, name="final")
    assert saved.step == recipe.run.step == recipe.next_step
    kinds = list(RunEvent.objects.filter(run=recipe.run).values_list("kind", flat=True))
    assert (kinds.count("save_failed"), kinds.count(recipe.state)) == (1, 1)


def test_a_run_whose_last_checkpoint_has_no_room_can_be_discarded(begin: Begin, worker: Staff) -> None:
    recipe = about_to_end(begin, worker, is_stopped=False)
    with no_room(limit_bytes=NO_ROOM_BYTES):
        worker.start()
        recipe = turn_until(recipe, lambda row: row.run.held_up, what="the disk is found full")
        recipes.stop(recipe, keep=False)
        recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.held_up) == (State.DISCARDED, "", "")
    assert len(failed_saves(recipe)) == 1


@pytest.mark.parametrize(
    ("state", "category", "lone_attempts", "first_step", "is_again"),
    [
        ("failed", "server", 0, 0, True),
        ("failed", "server", 1, 0, True),
        ("failed", "server", 2, 0, False),  # it would end its worker once more
        ("failed", "user", 0, 0, False),
        ("done", "", 0, 0, False),
        ("failed", "server", 0, 30, False),  # nothing was trained: another checkpoint of the person's
    ],
)
def test_only_what_passes_is_saved_again(
    alice: User, state: str, category: str, lone_attempts: int, first_step: int, is_again: bool
) -> None:
    run = seed.make_run(alice, step=30)
    recipe = recipe_seed.make_recipe(run, state=State.STOPPING, next_seq=42, first_step=first_step)
    Operation.objects.filter(run=run).delete()
    add_operation(run, 40, Kind.SAVE_WEIGHTS, "failed" if state == "done" else "done")
    newest = add_operation(run, 41, Kind.SAVE_WEIGHTS, state)
    Operation.objects.filter(pk=newest.pk).update(error_category=category, lone_attempts=lone_attempts)

    assert recipe_steps.failed_final(recipe) == (newest if is_again else None)
