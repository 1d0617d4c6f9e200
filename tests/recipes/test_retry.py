"""Where a failed run goes on from, and what a retry leaves of the steps that it does again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runs.models import Checkpoint, Evaluation, FixedSample, Operation, Recipe, TrainingRun, User
from runs.recipes.loop import RecipeLoop
from runs.services import active_recipes, recipe_samples, recipe_steps, recipes
from runs.services.recipe_rows import State
from tests.pages import recipe_seed, seed
from tests.recipes.conftest import Staff, ended, read, turn_until
from tests.recipes.test_loop import adapter_digest, break_a_step, series
from tests.worker.conftest import wait_for

Begin = Callable[..., Recipe]
Kind = Operation.Kind


def add_operation(run: TrainingRun, seq: int, kind: str, state: str) -> Operation:
    return Operation.objects.create(owner=run.owner, run=run, seq=seq, kind=kind, state=state)


def add_checkpoint(run: TrainingRun, name: str, *, seq: int, step: int) -> None:
    checkpoint = seed.add_checkpoint(run, name, step=step)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(seq=seq)


@pytest.fixture
def recipe(alice: User) -> Recipe:
    """Return a failed recipe whose run has no operations yet."""
    return recipe_seed.make_recipe(seed.make_run(alice, step=30), state=State.FAILED, next_seq=40)


def test_a_retry_trains_the_batch_that_failed_and_not_from_what_was_saved_after_it(
    begin: Begin, worker: Staff
) -> None:
    settings = {"num_steps": 12, "save_every": 1, "keep_checkpoints": 20, "validation": {"share": 0}}
    undisturbed = ended(begin(**settings))
    recipe = break_a_step(begin(**settings), worker, after=3)
    recipe = turn_until(recipe, lambda row: row.run.applied_seq == row.next_seq - 1, what="what lies behind")
    failed = Operation.objects.get(run=recipe.run, kind=Kind.FORWARD_BACKWARD, state="failed")
    assert Checkpoint.objects.filter(run=recipe.run, seq__gt=failed.seq).exists()

    recipes.retry(recipe)
    recipe = ended(recipe)

    assert (recipe.state, recipe.error) == (State.FINISHED, "")
    assert series(recipe, "loss")[-1] == series(undisturbed, "loss")[-1]
    assert adapter_digest(recipe) == adapter_digest(undisturbed)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ([], "step-000008"),
        ([(5, Kind.FORWARD_BACKWARD, "failed")], "step-000002"),
        ([(5, Kind.OPTIM_STEP, "failed"), (7, Kind.OPTIM_STEP, "failed")], "step-000002"),
        ([(5, Kind.FORWARD, "failed"), (7, Kind.SAVE_WEIGHTS, "failed")], "step-000008"),
        ([(1, Kind.FORWARD_BACKWARD, "failed")], None),
        # The steps after a load are good, those before it are not; a load that failed ends nothing.
        ([(5, Kind.FORWARD_BACKWARD, "failed"), (7, Kind.LOAD_WEIGHTS, "done")], "step-000008"),
        ([(5, Kind.FORWARD_BACKWARD, "failed"), (9, Kind.LOAD_WEIGHTS, "done")], "step-000002"),
        ([(5, Kind.FORWARD_BACKWARD, "failed"), (7, Kind.LOAD_WEIGHTS, "failed")], "step-000002"),
    ],
)
def test_a_retry_goes_on_from_before_the_first_failure(
    recipe: Recipe, log: list[tuple[int, str, str]], expected: str | None
) -> None:
    add_checkpoint(recipe.run, "step-000002", seq=4, step=2)
    add_checkpoint(recipe.run, "step-000008", seq=8, step=8)
    for seq, kind, state in log:
        add_operation(recipe.run, seq, kind, state)

    point = recipes.retry_point(recipe)

    assert (point.name if point is not None else None) == expected


def test_a_retry_at_the_end_trains_no_further_step(begin: Begin) -> None:
    recipe = ended(begin(num_steps=4))
    Recipe.objects.filter(pk=recipe.pk).update(state=State.FAILED)

    recipes.retry(recipe)
    recipe = ended(recipe)

    assert (recipe.state, recipe.error, recipe.run.step) == (State.FINISHED, "", 4)
    assert [step for step, _ in series(recipe, "loss")] == [1, 2, 3, 4]


def test_a_retry_forgets_a_best_step_that_is_done_again(recipe: Recipe) -> None:
    add_checkpoint(recipe.run, "step-000020", seq=25, step=20)
    recipe_seed.add_evaluations(recipe.run, [10, 20, 30])
    Recipe.objects.filter(pk=recipe.pk).update(best_step=30)

    recipes.retry(recipe)

    assert (recipe.next_step, recipe.best_step) == (20, 20)
    assert not Evaluation.objects.filter(run=recipe.run, step=30).exists()


def add_sampled_weights(recipe: Recipe, seq: int, *, step: int, state: str | None) -> Checkpoint:
    """Enter weights that were saved for a sample, which is asked if it has a state."""
    run = recipe.run
    checkpoint = seed.add_checkpoint(run, f"sample-{seq}", kind="sampler_weights", step=step)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(seq=seq, is_ephemeral=True)
    operation = None
    if state is not None:
        operation = seed.add_sample(run, [1], [[1]])
        Operation.objects.filter(pk=operation.pk).update(state=state)
    FixedSample.objects.create(run=run, step=step, prompt="Hello!", save_seq=seq, operation=operation)
    return checkpoint


@pytest.mark.parametrize("state", [State.FAILED, State.STOPPED])
def test_an_ended_run_keeps_no_weights_for_samples_that_have_answers(
    recipe: Recipe, state: State, worker: Staff
) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=state, ended_at=recipe.started_at)
    worker.stop()
    for seq, step, sample in ((10, 5, "done"), (20, 10, "queued"), (30, 15, None)):
        add_sampled_weights(recipe, seq, step=step, state=sample)
    weights = Checkpoint.objects.filter(run=recipe.run, is_ephemeral=True)

    turn_until(recipe, lambda _: weights.count() == 1, what="the weights of answered samples go")
    assert weights.get().seq == 20
    assert FixedSample.objects.get(run=recipe.run, step=15).error == "the run ended before this was asked"
    Operation.objects.filter(fixedsample__run=recipe.run).update(state="done")
    turn_until(recipe, lambda _: not active_recipes.find(), what="nothing left to do")
    assert not weights.exists()


def test_weights_of_samples_that_a_retry_draws_again_go(recipe: Recipe) -> None:
    add_checkpoint(recipe.run, "step-000006", seq=12, step=6)
    for seq, step, sample in ((10, 5, None), (20, 10, "done"), (30, 15, None)):
        add_sampled_weights(recipe, seq, step=step, state=sample)

    recipes.retry(recipe)
    recipe_samples.drop_weights(recipe)

    weights = Checkpoint.objects.filter(run=recipe.run, is_ephemeral=True)
    assert list(weights.values_list("seq", flat=True)) == [10]
    drawn = FixedSample.objects.filter(run=recipe.run).order_by("step")
    assert list(drawn.values_list("step", flat=True)) == [5, 10]


def add_unasked(recipe: Recipe, *, save_seq: int | None, step: int | None) -> FixedSample:
    return FixedSample.objects.create(run=recipe.run, step=step, prompt="Hello!", save_seq=save_seq)


def test_a_discarded_run_has_no_samples_that_wait(recipe: Recipe, worker: Staff) -> None:
    worker.stop()
    add_sampled_weights(recipe, 10, step=5, state="done")
    add_sampled_weights(recipe, 20, step=10, state=None)
    add_unasked(recipe, save_seq=30, step=15)
    add_unasked(recipe, save_seq=None, step=None)
    Recipe.objects.filter(pk=recipe.pk).update(state=State.DISCARDING, next_seq=recipe.run.applied_seq + 1)

    recipe = ended(recipe)

    assert recipe.state == State.DISCARDED
    assert not recipe_samples.has_open(recipe)
    errors = dict(FixedSample.objects.filter(run=recipe.run).values_list("step", "error"))
    assert errors == {5: "", **dict.fromkeys((10, 15, None), "the run ended before this was asked")}


def test_samples_whose_weights_do_not_come_end_with_the_run_that_fails(recipe: Recipe, worker: Staff) -> None:
    worker.stop()
    Recipe.objects.filter(pk=recipe.pk).update(state=State.RUNNING)
    add_unasked(recipe, save_seq=recipe.run.applied_seq + 1, step=25)
    TrainingRun.objects.filter(pk=recipe.run_id).update(state="failed", error="it diverged")

    recipe = ended(recipe)

    assert (recipe.state, recipe.error) == (State.FAILED, "it diverged")
    assert not recipe_samples.has_open(recipe)
    assert FixedSample.objects.get(run=recipe.run).error == "the run ended before this was asked"


def test_a_retry_asks_the_base_model_what_was_given_up(begin: Begin, worker: Staff) -> None:
    recipe = begin(num_steps=4, save_every=2, samples={"prompts": ["Hello!"], "max_tokens": 4, "every": 2})
    read(loop := RecipeLoop(), recipe)
    worker.stop()
    for _ in range(2):  # it is prepared, and begins
        loop.turn()
    recipe.refresh_from_db()
    recipe_steps.fail(recipe, "for the test")
    drawn = FixedSample.objects.filter(run=recipe.run)
    assert drawn.get().error == "the run ended before this was asked"
    worker.start()

    recipes.retry(recipe)
    recipe = ended(recipe)

    assert (recipe.state, recipe.error) == (State.FINISHED, "")
    assert set(drawn.values_list("step", "operation__state", "error")) == {
        (step, "done", "") for step in (None, 2, 4)
    }


def test_a_stopped_run_ends_without_sampled_weights(begin: Begin) -> None:
    samples = {"prompts": ["Hello!"], "max_tokens": 200, "every": 1}
    recipe = begin(num_steps=400, samples=samples, validation={"share": 0})
    recipe = turn_until(recipe, lambda row: row.run.step >= 4, what="some steps")
    recipes.stop(recipe, keep=True)
    recipe = ended(recipe)
    assert recipe.state == State.STOPPED

    weights = Checkpoint.objects.filter(run=recipe.run, is_ephemeral=True)
    turn_until(recipe, lambda _: not weights.exists(), what="the sampled weights go")
    wait_for(lambda: not recipe_samples.has_open(recipe), what="the answers")
    assert set(FixedSample.objects.filter(run=recipe.run).values_list("error", flat=True)) == {""}
