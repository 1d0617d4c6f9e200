"""What passes by itself holds a run up and does not end it; see `test_loop` for a full disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from pytest_django.fixtures import Settings

from runs.models import FixedSample, Operation, Recipe, User
from runs.services import holdups, operations, sampling, sessions
from runs.services.recipe_rows import State
from tests.recipes.conftest import BASE_MODEL, Staff, ended, turn_until
from tests.recipes.test_loop import series

Begin = Callable[..., Recipe]


@contextmanager
def unusable(folder: Path) -> Iterator[None]:
    """Put a file in a folder's place, so that nothing in it can be read or written."""
    aside = folder.with_name("aside")
    folder.mkdir(parents=True, exist_ok=True)
    folder.rename(aside)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


@pytest.mark.parametrize("step", [0, 2])
def test_files_that_cannot_be_reached_hold_a_run_up(begin: Begin, settings: Settings, step: int) -> None:
    settings.INLINE_PAYLOAD_BYTES = 0
    folder = Path(default_storage.path("payloads")) if step else settings.DATA_DIR / "cache" / "tokens"
    recipe = begin()
    if step:
        recipe = turn_until(recipe, lambda row: row.run.step >= step, what="the first steps")
    with unusable(folder):
        recipe = turn_until(
            recipe, lambda row: row.run.held_up or row.error, what="the folder is found unusable"
        )
        assert recipe.run.held_up == holdups.NO_STORAGE_FOR_STEP
    recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.held_up) == (State.FINISHED, "", "")
    assert [number for number, _ in series(recipe, "loss")] == list(range(1, 13))


def test_samples_that_too_many_wait_before_hold_a_run_up(begin: Begin, worker: Staff, alice: User) -> None:
    worker.stop()
    session = sampling.create_sampling_session(
        sessions.create_session(alice), seq_id=0, base_model=BASE_MODEL, checkpoint=None
    )
    Operation.objects.bulk_create(
        Operation(owner=alice, sampling_session=session, seq=seq, kind=Operation.Kind.SAMPLE, payload=b"{}")
        for seq in range(operations.MAX_QUEUED_SAMPLES)
    )
    recipe = begin(samples={"prompts": ["Hello!"], "max_tokens": 4})

    recipe = turn_until(
        recipe, lambda row: row.run.held_up or row.error, what="too many samples are found waiting"
    )

    assert recipe.run.held_up == holdups.NO_TURN_FOR_STEP
    Operation.objects.filter(sampling_session=session).delete()
    worker.start()
    recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.held_up) == (State.FINISHED, "", "")
    drawn = FixedSample.objects.filter(run=recipe.run)
    assert set(drawn.values_list("operation__state", flat=True)) == {"done"}
