"""What passes by itself holds a run up and does not end it; see `test_loop` for a full disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.core.files.storage import default_storage
from pytest_django.fixtures import Settings

from runs.exceptions import RequestInvalid
from runs.models import BaseModel, DatasetVersion, FixedSample, Operation, Recipe, User
from runs.services import base_models, dataset_rows, holdups, operations, run_rows, sampling, sessions
from runs.services.recipe_rows import State
from tests.recipes.conftest import BASE_MODEL, TINY, Staff, ended, turn_until
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


@contextmanager
def unmounted() -> Iterator[None]:
    """Have the storage look as it does while its disk is not mounted."""
    folder = Path(default_storage.path(""))
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder)
        aside.rename(folder)


def report(**values: Any) -> None:
    """Enter something else about the base model than its worker found."""
    BaseModel.objects.filter(name=BASE_MODEL).update(**values)
    base_models._cache = None


def told(recipe: Recipe) -> tuple[str, str]:
    """Return the phase and the reason on the run's page."""
    facts = run_rows.facts_of(run_rows.with_facts(recipe.run.owner).get(pk=recipe.run_id))
    assert facts.progress is not None
    return facts.progress.phase, facts.reason


def held_up(recipe: Recipe) -> Recipe:
    return turn_until(recipe, lambda row: row.run.held_up or row.error, what="what holds the run up is met")


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


@pytest.mark.parametrize(
    ("step", "phase"),
    [(0, f"Waiting until base model {BASE_MODEL} is loaded"), (2, "Held up, training: step ")],
)
def test_a_run_whose_base_model_could_not_be_loaded_waits_and_says_why(
    begin: Begin, worker: Staff, step: int, phase: str
) -> None:
    recipe = begin()
    if step:
        recipe = turn_until(recipe, lambda row: row.run.step >= step, what="the first steps")
    worker.stop()
    report(error="no memory", vocab_size=0)

    recipe = held_up(recipe)

    assert recipe.error == ""
    shown, reason = told(recipe)
    assert shown.startswith(phase)
    assert reason.startswith(
        f"base model '{BASE_MODEL}' could not be loaded: no memory; the run goes on by itself"
    )
    worker.start()
    recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.held_up) == (State.FINISHED, "", "")
    assert [number for number, _ in series(recipe, "loss")] == list(range(1, 13))


@pytest.mark.parametrize("is_there", [False, True])
def test_a_base_model_on_a_disk_that_is_not_mounted_holds_a_run_up(
    begin: Begin, tmp_path: Path, is_there: bool
) -> None:
    folder = tmp_path / "models"
    if is_there:
        folder.mkdir()  # the place of the disk
    recipe = begin()
    report(directory=str(folder))

    recipe = held_up(recipe)

    assert recipe.error == ""
    assert told(recipe)[1].startswith(f"the files of base model {BASE_MODEL} are not on this machine yet")
    report(directory=str(TINY))
    recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.held_up) == (State.FINISHED, "", "")


def test_a_base_model_that_is_not_on_offer_for_a_while_holds_a_run_up(
    begin: Begin, settings: Settings
) -> None:
    recipe = begin()
    offered, settings.BASE_MODELS = settings.BASE_MODELS, {"test/other": str(TINY)}
    base_models._cache = None

    recipe = held_up(recipe)

    phase, reason = told(recipe)
    assert phase == f"Waiting until base model {BASE_MODEL} is loaded"
    assert reason.startswith(f"unknown base model '{BASE_MODEL}'; this server offers 'test/other'")
    settings.BASE_MODELS = offered
    base_models._cache = None
    recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.held_up) == (State.FINISHED, "", "")


def test_a_dataset_on_a_disk_that_is_not_mounted_holds_a_run_up(begin: Begin, worker: Staff) -> None:
    worker.stop()
    recipe = begin(max_length=79)  # tokens of its own: none are kept from another test
    with unmounted():
        recipe = held_up(recipe)
        assert (recipe.error, recipe.run.held_up) == ("", holdups.NO_STORAGE_FOR_STEP)
        assert not list(Path(default_storage.path("")).iterdir())
    worker.start()
    recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.held_up) == (State.FINISHED, "", "")


def test_a_version_without_rows_is_told_from_a_disk_that_is_not_mounted(
    add_dataset: Callable[..., DatasetVersion],
) -> None:
    version = add_dataset([{"text": "one"}])
    with unmounted(), pytest.raises(OSError, match="is its disk mounted"):
        dataset_rows.open_rows(version)
    default_storage.delete(f"{version.directory}/{dataset_rows.ROWS}")
    with pytest.raises(RequestInvalid, match="has no rows"):
        dataset_rows.open_rows(version)
