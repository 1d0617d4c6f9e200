"""The version of what a run's page shows: another one after each change, the same while nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from tokenizers import Tokenizer

from runs.models import Checkpoint, FixedSample, Operation, Recipe, RunEvent, TrainingRun
from runs.services import run_versions
from tests.pages import recipe_seed, seed

pytestmark = pytest.mark.django_db(transaction=True)  # each change has a transaction of its own
State = Operation.State


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return seed.make_tokenizer(tmp_path)


@pytest.fixture
def run(tokenizer: Tokenizer) -> TrainingRun:
    """Return a run that has something of everything its page lists."""
    run = seed.make_run(seed.make_user("alice"), name="looked at")
    seed.add_values(run, seed.curve(10))
    seed.add_operations(run, num_done=2, num_queued=1)
    checkpoint = seed.add_checkpoint(run, "one")
    seed.make_fork(run.owner, checkpoint, name="child")
    recipe_seed.make_recipe(run)
    seed.add_sample(run, [1, 2], [[3]], checkpoint=checkpoint)
    recipe_seed.add_fixed_sample(run, tokenizer, step=5, prompt="Who?", answer=None, is_asked=True)
    recipe_seed.add_event(run, "saved", 5, checkpoint="one")
    return run


CHANGES: dict[str, Callable[[TrainingRun], object]] = {
    "run": lambda run: TrainingRun.objects.filter(pk=run.pk).update(held_up="no room"),
    "recipe": lambda run: Recipe.objects.filter(run=run).update(state=Recipe.State.PAUSED),
    "event": lambda run: recipe_seed.add_event(run, "saved", 6, checkpoint="two"),
    "event gone": lambda run: RunEvent.objects.filter(run=run).delete(),
    "checkpoint": lambda run: seed.add_checkpoint(run, "two"),
    "checkpoint kept": lambda run: Checkpoint.objects.filter(run=run).update(is_public=True),
    "checkpoint gone": lambda run: Checkpoint.objects.filter(run=run).delete(),
    "fork": lambda run: seed.make_fork(run.owner, Checkpoint.objects.get(run=run), name="another"),
    "operation begun": lambda run: run.operations.filter(state=State.QUEUED).update(attempts=1),
    "sample": lambda run: seed.add_sample(run, [1, 2], [[4]]),
    "sample failed": lambda run: Operation.objects.filter(sampling_session__run=run, state=State.DONE).update(
        state=State.FAILED
    ),
    "fixed sample": lambda run: FixedSample.objects.create(run=run, step=9, prompt="Who?"),
    "fixed sample answered": lambda run: Operation.objects.filter(fixedsample__run=run).update(
        state=State.DONE
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_another_after(change: str, run: TrainingRun) -> None:
    before = run_versions.version_of(run.pk)
    assert run_versions.version_of(run.pk) == before
    CHANGES[change](run)
    assert run_versions.version_of(run.pk) != before


def test_other_runs_change_nothing_and_a_look_is_one_query(run: TrainingRun) -> None:
    before = run_versions.version_of(run.pk)
    other = seed.make_run(run.owner, name="other", session=run.session)
    seed.add_checkpoint(other, "theirs")
    seed.add_operations(other)
    with CaptureQueriesContext(connection) as queries:
        assert run_versions.version_of(run.pk) == before
    assert len(queries) == 1


def test_a_run_that_is_gone_has_none() -> None:
    assert run_versions.version_of(1) == ""
