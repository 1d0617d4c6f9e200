"""Steering a run while it trains, and what may be done after its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from django.core.files.storage import default_storage
from django.db import connection
from django.test.utils import CaptureQueriesContext

from runs.exceptions import RequestInvalid
from runs.models import (
    Checkpoint,
    DatasetVersion,
    Evaluation,
    FixedSample,
    Metric,
    Recipe,
    RunEvent,
    TrainingRun,
    User,
)
from runs.recipes.loop import RecipeLoop
from runs.schemas.recipes import Changes, SftConfig
from runs.services import active_recipes, holdups, recipe_samples, recipe_status, recipe_steps, recipes
from runs.services.recipe_rows import State
from tests.recipes.conftest import LEARNS_NOTHING, Staff, ended, questions, turn_until
from tests.recipes.test_loop import break_a_step, series

Begin = Callable[..., Recipe]


def started(recipe: Recipe, *, step: int = 4) -> Recipe:
    return turn_until(recipe, lambda row: row.run.step >= step, what=f"step {step}")


def drained(recipe: Recipe) -> Recipe:
    return turn_until(
        recipe, lambda row: row.run.applied_seq == row.next_seq - 1, what="the submitted operations' end"
    )


def texts(recipe: Recipe, *, step: int) -> dict[str, bytes]:
    """Return the answers to the fixed prompts after a step."""
    drawn = FixedSample.objects.filter(run=recipe.run, step=step).select_related("operation")
    return {one.prompt: bytes(one.operation.result or b"") for one in drawn if one.operation is not None}


def event(recipe: Recipe, kind: str) -> RunEvent:
    return RunEvent.objects.get(run=recipe.run, kind=kind)


def test_a_paused_run_does_what_is_submitted_and_then_nothing(begin: Begin) -> None:
    recipe = started(begin(num_steps=400))
    recipes.pause(recipe)

    recipe = drained(recipe)
    paused_at = recipe.run.step
    for _ in range(5):
        RecipeLoop().turn()
    recipe.run.refresh_from_db()
    assert recipe.run.step == paused_at < 400
    assert recipe_status.status_of(recipe).phase == f"paused at step {paused_at}"

    recipes.change(recipe, Changes(num_steps=paused_at + 2))
    recipes.resume(recipe)
    recipe = ended(recipe)
    assert [step for step, _ in series(recipe, "loss")] == list(range(1, paused_at + 3))


def test_a_paused_run_with_nothing_left_to_do_is_not_looked_at(begin: Begin) -> None:
    settings = {"every": 2, "max_tokens": 4, "prompts": ["Hello!"]}
    recipe = started(begin(num_steps=400, eval_every=2, samples=settings))
    recipes.pause(recipe)
    drained(recipe)
    turn_until(recipe, lambda _: not active_recipes.find(), what="nothing left to do")

    recipe.refresh_from_db()
    assert recipe.run.applied_seq == recipe.watched_seq == recipe.next_seq - 1
    assert recipe_steps.open_evaluations(recipe) == []
    assert not recipe_samples.has_open(recipe)
    assert not Checkpoint.objects.filter(run=recipe.run, is_ephemeral=True).exists()
    with CaptureQueriesContext(connection) as queries:
        RecipeLoop().turn()
    assert len(queries) == 1


def test_a_run_paused_while_it_is_held_up_is_let_on(begin: Begin) -> None:
    recipe = started(begin(num_steps=400))
    recipes.pause(recipe)
    recipe = turn_until(recipe, lambda _: not active_recipes.find(), what="nothing left to do")
    holdups.enter(recipe.run_id, holdups.NO_ROOM_FOR_STEP)

    RecipeLoop().turn()

    recipe.run.refresh_from_db()
    assert recipe.run.held_up == ""


def test_a_changed_rate_holds_from_the_next_step_and_is_told(begin: Begin) -> None:
    recipe = started(begin(num_steps=400, schedule="constant", warmup_share=0, learning_rate=1e-3))
    recipes.pause(recipe)
    recipe = drained(recipe)
    recipes.change(recipe, Changes(learning_rate=2e-4, num_steps=recipe.next_step + 3))
    changed_at = recipe.next_step
    recipes.resume(recipe)

    recipe = ended(recipe)

    rates = dict(series(recipe, "learning_rate"))
    assert {rate for step, rate in rates.items() if step <= changed_at} == {1e-3}
    assert {rate for step, rate in rates.items() if step > changed_at} == {2e-4}
    told = event(recipe, "changed")
    assert told.step == changed_at
    assert told.detail["learning_rate"] == "0.001 to 0.0002"


@pytest.mark.parametrize("prompts", [["Who?", "Where?"], []])
def test_prompts_that_change_leave_the_samples_that_wait_as_they_are(
    begin: Begin, prompts: list[str]
) -> None:
    settings = {"every": 2, "max_tokens": 4, "temperature": 1.0, "seed": 7}
    asked = ["Hello!", "What is 1 + 1?"]
    undisturbed = ended(begin(samples={"prompts": asked, **settings}))
    recipe = begin(samples={"prompts": asked, **settings})
    recipe = turn_until(recipe, lambda row: row.next_step >= 2, what="samples that wait")
    recipes.change(recipe, Changes.model_validate({"samples": {"prompts": prompts, **settings}}))

    recipe = ended(recipe)

    assert (recipe.state, recipe.error) == (State.FINISHED, "")
    assert texts(recipe, step=2) == texts(undisturbed, step=2)
    assert set(texts(recipe, step=12)) == set(prompts)


def test_a_run_stopped_to_keep_ends_with_a_checkpoint_and_can_go_on(begin: Begin) -> None:
    recipe = started(begin(num_steps=400))
    recipes.stop(recipe, keep=True)

    recipe = ended(recipe)
    assert recipe.state == State.STOPPED
    saved = Checkpoint.objects.get(run=recipe.run, name="final")
    assert saved.step == recipe.run.step < 400

    recipes.extend(recipe, 3)
    recipe = ended(recipe)
    assert recipe.state == State.FINISHED
    assert recipe.run.step == saved.step + 3


def test_a_discarded_run_keeps_its_charts_and_no_weights(begin: Begin) -> None:
    recipe = started(begin(num_steps=400, save_every=2), step=6)
    recipes.stop(recipe, keep=False)

    recipe = ended(recipe)

    assert recipe.state == State.DISCARDED
    assert not Checkpoint.objects.filter(run=recipe.run).exists()
    assert Metric.objects.filter(run=recipe.run, name="loss").count() >= 6
    assert recipe.run.state == TrainingRun.State.CLOSED
    with pytest.raises(RequestInvalid, match="cannot extend a run that is discarded"):
        recipes.extend(recipe, 2)


def test_a_finished_run_is_extended_in_place(begin: Begin) -> None:
    recipe = ended(begin(num_steps=4))
    recipes.extend(recipe, 4)

    recipe = ended(recipe)

    assert [step for step, _ in series(recipe, "loss")] == list(range(1, 9))
    assert Checkpoint.objects.get(run=recipe.run, name="final").step == 8


def test_a_run_that_stopped_early_trains_on_when_it_is_extended(begin: Begin) -> None:
    recipe = ended(begin(num_steps=40, eval_every=2, early_stopping=2, learning_rate=LEARNS_NOTHING))
    stopped_at = recipe.run.step
    assert event(recipe, "early_stopped").step == stopped_at

    recipes.extend(recipe, 10)
    recipe = ended(recipe)

    assert recipe.state == State.FINISHED
    assert recipe.run.step >= stopped_at + 4  # two evaluations of the steps that were asked for


def test_a_retry_whose_checkpoint_cannot_be_loaded_fails_again(begin: Begin, worker: Staff) -> None:
    recipe = started(begin(num_steps=60, save_every=2), step=6)
    worker.stop()
    recipe_steps.fail(recipe, "for the test")
    point = recipes.retry_point(Recipe.objects.get(pk=recipe.pk))
    assert point is not None
    recipes.retry(Recipe.objects.get(pk=recipe.pk))
    shutil.rmtree(default_storage.path(point.directory))
    worker.start()

    recipe = ended(recipe)

    assert recipe.state == State.FAILED
    assert "load_weights" in recipe.error


def test_a_checkpoint_is_saved_on_demand(begin: Begin) -> None:
    recipe = started(begin(num_steps=400))
    name = recipes.save_now(recipe)
    recipes.stop(recipe, keep=True)

    recipe = ended(recipe)

    saved = Checkpoint.objects.get(run=recipe.run, name=name)
    assert saved.kind == Checkpoint.Kind.TRAINING
    assert name == f"manual-{saved.step:06d}"


def test_a_fork_goes_on_where_its_checkpoint_was(begin: Begin, alice: User) -> None:
    parent = ended(begin(num_steps=8, save_every=4, schedule="constant", warmup_share=0))
    checkpoint = Checkpoint.objects.get(run=parent.run, name="step-000004")

    run = recipes.fork(alice, checkpoint, with_optimizer=True, changes={}, source="browser")
    fork = ended(Recipe.objects.get(run=run))

    assert (run.parent, run.parent_step) == (parent.run, 4)
    assert fork.state == State.FINISHED, fork.error
    assert series(fork, "loss") == series(parent, "loss")[4:]
    assert event(fork, "forked").detail["optimizer"] is True


@pytest.mark.parametrize(
    ("changes", "num_steps", "start"),
    [
        ({"num_epochs": 1}, 9, (0, 0)),
        ({"num_epochs": 1, "learning_rate": 1e-4}, 9, (0, 0)),
        ({"num_epochs": 1, "batch_size": 2}, 14, (4, 16)),
        ({"num_epochs": 1, "seed": 5}, 13, (4, 0)),
        ({"num_epochs": 1, "validation": {"share": 0.2}}, 12, (4, 0)),
        ({"num_epochs": 1, "batch_tokens": 2_000}, 5, (4, 16)),
        ({"num_epochs": 1, "max_length": None}, 13, (4, 0)),
    ],
)
def test_a_fork_goes_on_in_its_data_or_begins_other_data(
    begin: Begin, alice: User, changes: dict[str, Any], num_steps: int, start: tuple[int, int]
) -> None:
    parent = ended(begin(num_steps=4, batch_size=4, save_every=4, max_length=64))
    checkpoint = Checkpoint.objects.get(run=parent.run, name="final")

    run = recipes.fork(alice, checkpoint, with_optimizer=True, changes=changes, source="rest")
    fork = turn_until(Recipe.objects.get(run=run), lambda row: row.num_steps, what="its data is there")
    recipes.stop(fork, keep=False)

    assert (fork.data_step, fork.data_row) == start
    assert fork.num_steps == num_steps, (fork.preparation, fork.error)


@pytest.mark.parametrize("held_out_by", ["seed", "content"])
def test_a_fork_holds_out_the_rows_that_its_parent_did(begin: Begin, alice: User, held_out_by: str) -> None:
    parent = begin(num_steps=2)
    Recipe.objects.filter(pk=parent.pk).update(held_out_by=held_out_by)
    parent = ended(parent)
    checkpoint = Checkpoint.objects.get(run=parent.run, name="final")
    changes = {"seed": parent.config["seed"]}

    run = recipes.fork(alice, checkpoint, with_optimizer=False, changes=changes, source="rest")

    assert Recipe.objects.get(run=run).held_out_by == held_out_by
    fork = ended(Recipe.objects.get(run=run))
    before, after = (Evaluation.objects.filter(run=one.run).order_by("step") for one in (parent, fork))
    assert before.last().loss == after.first().loss  # type: ignore[union-attr]


def test_a_fork_onto_other_data_sees_all_of_it(
    begin: Begin, alice: User, add_dataset: Callable[..., DatasetVersion]
) -> None:
    parent = ended(begin(num_steps=6, batch_size=4))
    checkpoint = Checkpoint.objects.get(run=parent.run, name="final")
    other = add_dataset(questions(19, start=500), name="other")
    changes = {"dataset": other.dataset.public_id, "num_epochs": 1}

    run = recipes.fork(alice, checkpoint, with_optimizer=True, changes=changes, source="rest")
    fork = ended(Recipe.objects.get(run=run))
    again = recipes.fork(
        alice,
        Checkpoint.objects.get(run=run, name="final"),
        with_optimizer=True,
        changes={"num_epochs": 2},
        source="rest",
    )

    assert [step for step, _ in series(fork, "loss")] == [7, 8, 9, 10, 11]
    assert Recipe.objects.get(run=again).data_step == 6
    recipes.stop(Recipe.objects.get(run=again), keep=False)


def test_a_fork_without_optimizer_state_starts_to_count_again(begin: Begin, alice: User) -> None:
    parent = ended(begin(num_steps=4))
    checkpoint = Checkpoint.objects.get(run=parent.run, name="final")

    run = recipes.fork(
        alice, checkpoint, with_optimizer=False, changes={"num_steps": 3, "seed": 5}, source="rest"
    )
    fork = ended(Recipe.objects.get(run=run))

    assert [step for step, _ in series(fork, "loss")] == [1, 2, 3]
    assert series(fork, "loss")[0][1] < series(parent, "loss")[0][1]


def test_a_fork_must_end_after_its_start(begin: Begin, alice: User) -> None:
    parent = ended(begin(num_steps=4))
    checkpoint = Checkpoint.objects.get(run=parent.run, name="final")

    with pytest.raises(RequestInvalid, match="4 is not after step 4"):
        recipes.fork(alice, checkpoint, with_optimizer=True, changes={"num_steps": 4}, source="rest")
    assert TrainingRun.objects.count() == 1


def test_a_failed_run_goes_on_from_its_newest_checkpoint(begin: Begin, worker: Staff) -> None:
    undisturbed = ended(begin(num_steps=12, save_every=3))
    recipe = break_a_step(begin(num_steps=12, save_every=3), worker, after=3)
    assert recipe.state == State.FAILED

    recipes.retry(recipe)
    recipe = ended(recipe)

    assert (recipe.state, recipe.error, recipe.run.step) == (State.FINISHED, "", 12)
    retried = event(recipe, "retried")
    assert retried.detail["from_step"] % 3 == 0
    assert series(recipe, "loss")[-1] == series(undisturbed, "loss")[-1]


def test_a_change_while_the_data_is_read_is_not_lost(begin: Begin) -> None:
    recipe = begin()
    seen = Recipe.objects.get(pk=recipe.pk)
    recipes.change(recipe, Changes(learning_rate=2e-4))
    recipe_steps.prepared(seen, SftConfig.model_validate({**seen.config, "learning_rate": 1e-3}), {"a": 1})
    recipe = turn_until(recipe, lambda row: row.state == State.RUNNING, what="the first step")
    assert recipe.config["learning_rate"] == 2e-4


@pytest.mark.parametrize("action", ["resume", "retry", "extend"])
def test_what_the_state_forbids_is_refused_in_words(begin: Begin, action: str) -> None:
    recipe = begin()
    actions: dict[str, Callable[[], object]] = {
        "resume": lambda: recipes.resume(recipe),
        "retry": lambda: recipes.retry(recipe),
        "extend": lambda: recipes.extend(recipe, 1),
    }

    with pytest.raises(RequestInvalid, match=f"cannot {action} a run that is preparing"):
        actions[action]()


def test_the_end_cannot_be_moved_before_what_is_submitted(begin: Begin) -> None:
    recipe = started(begin(num_steps=400))

    with pytest.raises(RequestInvalid, match="is not after step"):
        recipes.change(recipe, Changes(num_steps=2))
    with pytest.raises(RequestInvalid, match="nothing to change"):
        recipes.change(recipe, Changes(num_steps=400))
