"""Whole runs through the loop and a real worker: what they submit, and that a loop may die at any point."""

from __future__ import annotations

import hashlib
import random
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from django.core.files.storage import default_storage
from django.db import IntegrityError, connection
from django.test.utils import CaptureQueriesContext
from pytest_django.fixtures import Settings

from runs.models import Checkpoint, Evaluation, FixedSample, Metric, Operation, Recipe, RunEvent
from runs.recipes.loop import RecipeLoop
from runs.schemas.recipes import MAX_PROMPT_CHARS
from runs.services import (
    active_recipes,
    holdups,
    recipe_rows,
    recipe_status,
    recipe_steps,
    recipes,
    run_rows,
)
from runs.services.recipe_rows import State
from tests.no_room import no_room
from tests.recipes.conftest import LEARNS_NOTHING, Staff, ended, questions, read, turn_until

Begin = Callable[..., Recipe]
Kind = Operation.Kind


def kinds(recipe: Recipe) -> list[str]:
    return list(Operation.objects.filter(run=recipe.run).order_by("seq").values_list("kind", flat=True))


def adapter_digest(recipe: Recipe, name: str = "final") -> str:
    checkpoint = Checkpoint.objects.get(run=recipe.run, name=name)
    with default_storage.open(f"{checkpoint.directory}/adapter_model.safetensors") as file:
        return hashlib.sha256(file.read()).hexdigest()


def series(recipe: Recipe, name: str) -> list[tuple[int, float]]:
    rows = Metric.objects.filter(run=recipe.run, name=name).order_by("seq")
    return list(rows.values_list("step", "value"))


def test_a_run_trains_measures_saves_and_finishes(begin: Begin) -> None:
    recipe = ended(begin(eval_every=4, samples={"prompts": ["What is 2 + 2?"], "max_tokens": 12}))

    assert (recipe.state, recipe.error) == (State.FINISHED, "")
    assert (recipe.run.step, recipe.next_step) == (12, 12)
    losses = series(recipe, "loss")
    assert [step for step, _ in losses] == list(range(1, 13))
    assert losses[-1][1] < losses[0][1]
    measured = series(recipe, "validation_loss")
    assert [step for step, _ in measured] == [0, 4, 8, 12]
    assert measured[-1][1] < measured[0][1]
    names = Checkpoint.objects.filter(run=recipe.run).values_list("name", flat=True)
    assert sorted(names) == ["final", "step-000004", "step-000008"]
    assert recipe.best_step == 12
    strip = FixedSample.objects.filter(run=recipe.run).order_by("step")
    assert {sample.step for sample in strip} == {None, 4, 8, 12}
    assert all(sample.operation and sample.operation.state == "done" for sample in strip)
    events = set(RunEvent.objects.filter(run=recipe.run).values_list("kind", flat=True))
    assert {"started", "saved", "best", "finished"} <= events


@pytest.mark.parametrize(("step", "phase"), [(0, "Reading the dataset"), (2, "Held up, training")])
def test_a_full_disk_holds_a_run_up_and_does_not_end_it(
    begin: Begin, settings: Settings, step: int, phase: str
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 0
    recipe = begin(max_length=77)  # tokens of its own: none are kept from another test
    if step:
        recipe = turn_until(recipe, lambda row: row.run.step >= step, what="the first steps")
    with no_room(limit_bytes=100):
        recipe = turn_until(recipe, lambda row: row.run.held_up, what="the disk is found full")
        facts = run_rows.facts_of(run_rows.with_facts(recipe.run.owner).get(pk=recipe.run_id))
    assert facts.progress is not None
    assert facts.progress.phase.startswith(phase)
    assert facts.reason == holdups.NO_ROOM_FOR_STEP
    recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.step) == (State.FINISHED, "", 12)
    assert (recipe.run.held_up, recipe.run.held_up_at) == ("", None)
    assert [number for number, _ in series(recipe, "loss")] == list(range(1, 13))


def test_a_turn_does_not_read_the_datasets_reports(begin: Begin) -> None:
    recipe = begin()
    with CaptureQueriesContext(connection) as queries:
        assert active_recipes.find() == [recipe]
    (query,) = queries
    assert '"runs_datasetversion"."kind"' in query["sql"]
    assert '"runs_datasetversion"."report"' not in query["sql"]


def test_open_settings_are_decided_and_kept(begin: Begin) -> None:
    recipe = turn_until(begin(num_steps=None, num_epochs=2), lambda row: row.num_steps, what="the plan")

    assert recipe.num_steps == recipe.config["num_steps"] == 18  # 36 rows twice, 4 a step
    assert recipe.config["learning_rate"] > 0
    assert recipe.config["eval_every"] == 2
    assert recipe.started_config["num_steps"] is None
    assert recipe.preparation["num_train_rows"] == 36


def test_more_epochs_than_a_run_has_steps_are_refused_in_words(
    begin: Begin, add_dataset: Callable[..., Any]
) -> None:
    many = add_dataset(questions(1_001), name="many")
    settings = {"dataset": many.dataset.public_id, "batch_size": 1, "validation": {"share": 0}}
    recipe = ended(begin(num_steps=None, num_epochs=1_000, **settings))

    assert recipe.state == State.FAILED
    assert recipe.error == "num_epochs: 1000 come to more than 1000000 steps, the most that a run has"


def test_a_new_loop_at_every_turn_makes_the_same_adapter(begin: Begin) -> None:
    settings = {"eval_every": 3, "keep_checkpoints": 9}
    undisturbed = ended(begin(**settings))
    disturbed = ended(begin(**settings), make_loop=RecipeLoop)

    assert adapter_digest(disturbed) == adapter_digest(undisturbed)
    assert series(disturbed, "loss") == series(undisturbed, "loss")
    assert series(disturbed, "validation_loss") == series(undisturbed, "validation_loss")


class _Dies(BaseException):
    """The process ends here."""


def test_a_loop_that_dies_in_the_middle_of_its_writes_repeats_and_skips_nothing(begin: Begin) -> None:
    settings: dict[str, Any] = {
        "num_steps": 6,
        "eval_every": 3,
        "samples": {"prompts": ["Hello!"], "max_tokens": 4},
    }
    undisturbed = ended(begin(**settings))
    recipe = begin(**settings)
    num_deaths = 0

    def dies_at(number: int) -> Callable[..., Any]:
        left = number

        def execute(run: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise _Dies
            return run(sql, params, many, context)

        return execute

    for number in [*range(1, 30), *range(30, 1, -1)]:
        loop = RecipeLoop()
        read(loop, recipe)
        try:
            with connection.execute_wrapper(dies_at(number)):
                while True:
                    loop.turn()
        except _Dies:
            num_deaths += 1
    recipe = ended(recipe)

    assert num_deaths == 58
    assert kinds(recipe).count(Kind.OPTIM_STEP) == 6
    assert adapter_digest(recipe) == adapter_digest(undisturbed)
    assert series(recipe, "validation_loss") == series(undisturbed, "validation_loss")
    assert FixedSample.objects.filter(run=recipe.run).count() == 3


def test_a_long_prompt_is_sampled_like_any_other(begin: Begin) -> None:
    letters = random.Random(1)
    prompt = "".join(letters.choices(string.ascii_letters + string.digits, k=MAX_PROMPT_CHARS))
    recipe = ended(begin(num_steps=2, eval_every=2, samples={"prompts": [prompt], "max_tokens": 2}))

    assert (recipe.state, recipe.error) == (State.FINISHED, "")
    strip = FixedSample.objects.filter(run=recipe.run, prompt=prompt)
    assert {sample.step for sample in strip} == {None, 2}
    with pytest.raises(IntegrityError, match="fixed_sample_of_prompt"):
        FixedSample.objects.create(run=recipe.run, step=None, prompt=prompt)


def test_two_loops_at_once_do_the_work_of_one(begin: Begin) -> None:
    undisturbed = ended(begin())
    other = RecipeLoop()

    def both(row: Recipe) -> bool:
        other.turn()
        return row.state == State.FINISHED

    recipe = turn_until(begin(), both, what="the end")

    assert Counter(kinds(recipe)) == Counter(kinds(undisturbed))
    assert adapter_digest(recipe) == adapter_digest(undisturbed)


def test_it_stays_some_seconds_ahead_of_the_worker(begin: Begin, worker: Staff) -> None:
    recipe = begin(num_steps=200, validation={"share": 0})
    worker.stop()  # or it may have caught up by the time that somebody looks

    recipe = turn_until(recipe, lambda row: row.next_step > 0, what="the first steps")

    assert recipe.next_seq - 1 - recipe.run.applied_seq >= 4


def test_early_stopping_ends_a_run_that_does_not_get_better(begin: Begin) -> None:
    recipe = ended(begin(num_steps=40, eval_every=2, early_stopping=2, learning_rate=LEARNS_NOTHING))

    assert recipe.state == State.FINISHED
    measured = series(recipe, "validation_loss")
    best_step = min(measured, key=lambda pair: pair[1])[0]
    assert recipe.run.step == best_step + 4 < 40
    assert RunEvent.objects.filter(run=recipe.run, kind="early_stopped").exists()
    assert Checkpoint.objects.filter(run=recipe.run, name="final", step=recipe.run.step).exists()


def test_only_the_newest_and_the_best_checkpoints_are_kept(begin: Begin) -> None:
    recipe = ended(begin(num_steps=10, save_every=1, keep_checkpoints=2, schedule="constant"))

    kept = list(Checkpoint.objects.filter(run=recipe.run).order_by("step").values_list("name", flat=True))
    assert kept == ["step-000008", "step-000009", "final"]


def test_a_checkpoint_is_not_deleted_before_it_is_measured(begin: Begin, worker: Staff) -> None:
    settings = {"num_steps": 4, "save_every": 2, "keep_checkpoints": 1}
    recipe = turn_until(begin(**settings), lambda row: row.best_step == 2, what="the first best")
    recipe = ended(recipe)
    worker.stop()
    run = recipe.run
    Checkpoint.objects.filter(run=run, name="final").update(name="step-000004")
    measured = Evaluation.objects.filter(run=run, step=4)
    measured.update(loss=None)

    recipe_steps.prune(recipe, keep=1)
    assert Checkpoint.objects.filter(run=run).count() == 2
    measured.update(loss=100.0)
    recipe_steps.prune(recipe, keep=1)
    assert Checkpoint.objects.get(run=run).step == 2


def test_several_held_out_datasets_have_losses_of_their_own(
    begin: Begin, add_dataset: Callable[..., Any]
) -> None:
    other = add_dataset(questions(5, start=500), name="other")
    recipe = ended(begin(num_steps=2, validation={"share": 0.1, "datasets": [other.dataset.public_id]}))

    names = set(Metric.objects.filter(run=recipe.run).values_list("name", flat=True))
    assert {"validation_loss", "validation_loss/split", "validation_loss/other"} <= names
    rows = Evaluation.objects.filter(run=recipe.run, step=2)
    total = sum(row.num_tokens for row in rows)
    expected = sum((row.loss or 0) * row.num_tokens for row in rows) / total
    assert dict(series(recipe, "validation_loss"))[2] == pytest.approx(expected)


def test_held_out_datasets_of_one_name_have_losses_of_their_own(
    begin: Begin, add_dataset: Callable[..., Any]
) -> None:
    others = [add_dataset(questions(5, start=start), name="split") for start in (500, 600)]
    given = [other.dataset.public_id for other in others]
    recipe = ended(begin(num_steps=2, validation={"share": 0.1, "datasets": given}))

    rows = Evaluation.objects.filter(run=recipe.run, step=2)
    losses = {f"validation_loss/{row.label}": row.loss for row in rows}
    assert set(losses) == {"validation_loss/split", *(f"validation_loss/{ref}@1" for ref in given)}
    measured = Metric.objects.filter(run=recipe.run, name__startswith="validation_loss/", step=2)
    assert dict(measured.values_list("name", "value")) == pytest.approx(losses)


def break_a_step(recipe: Recipe, worker: Staff, *, after: int) -> Recipe:
    """Break an operation that is submitted and not yet taken, while the worker is away."""
    recipe = turn_until(recipe, lambda row: row.run.step >= after, what="some steps")
    worker.stop()
    recipe = turn_until(recipe, lambda row: row.next_seq - row.run.applied_seq > 3, what="waiting steps")
    waiting = Operation.objects.filter(run=recipe.run, state="queued", kind=Kind.FORWARD_BACKWARD)
    waiting.filter(pk=waiting.latest("seq").pk).update(payload=b"broken")
    worker.start()
    return ended(recipe)


def test_a_failed_step_fails_the_run_and_says_why(begin: Begin, worker: Staff) -> None:
    recipe = break_a_step(begin(num_steps=500), worker, after=1)

    assert recipe.state == State.FAILED
    assert "forward_backward" in recipe.error
    assert "retry" in recipe_status.status_of(recipe).allowed


def test_runs_beyond_the_slots_wait_in_order(begin: Begin, settings: Any) -> None:
    settings.CONCURRENT_RUNS = 1
    first, second, third = begin(num_steps=300), begin(num_steps=3), begin(num_steps=3)

    third = turn_until(
        third,
        lambda row: row.state == State.QUEUED and Recipe.objects.get(pk=first.pk).next_step > 6,
        what="the queue",
    )
    second.refresh_from_db()
    assert recipe_status.status_of(second).position == 1
    waiting = recipe_status.status_of(third)
    assert waiting.position == 2
    assert waiting.phase == "queued, position 2"

    loop = RecipeLoop()
    for recipe in (second, third):
        read(loop, recipe)  # who has no data yet lets others go first
    recipe_steps.fail(first, "ended by the test")
    third = ended(third, make_loop=lambda: loop)
    second.refresh_from_db()
    assert second.state == State.FINISHED
    assert second.ended_at is not None
    assert third.started_at is not None
    assert second.ended_at <= third.started_at


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_run_that_is_stopped_before_it_starts_holds_no_slot_and_no_end_up(
    begin: Begin, worker: Staff, settings: Settings, is_paused: bool
) -> None:
    settings.CONCURRENT_RUNS = 1
    worker.stop()  # nobody creates the run
    recipe = begin(num_steps=3)
    if is_paused:
        recipes.pause(recipe)
    recipes.stop(recipe, keep=True)
    assert recipe.state == State.STOPPING
    assert recipe_rows.has_free_slot()

    RecipeLoop().turn()

    recipe.refresh_from_db()
    assert recipe.state == State.STOPPED
    worker.start()
    recipes.resume(recipe)
    recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.step) == (State.FINISHED, "", 3)


def test_weights_saved_for_samples_only_are_deleted_after_them(begin: Begin) -> None:
    recipe = ended(begin(samples={"prompts": ["Hello!", "What is 1 + 1?"], "max_tokens": 4}, eval_every=6))

    assert not Checkpoint.objects.filter(run=recipe.run, is_ephemeral=True).exists()
    assert FixedSample.objects.filter(run=recipe.run, operation__state="done").count() == 6
