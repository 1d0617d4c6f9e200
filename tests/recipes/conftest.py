"""A recipe's surroundings: a user with a dataset, and a real worker on the model that ships with mintweb."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pytest_django.fixtures import Settings

from gpuworker.worker import GpuWorker
from runs.models import DatasetVersion, Recipe, TrainingRun, User
from runs.recipes.loop import RecipeLoop
from runs.schemas.recipes import SftConfig
from runs.services import datasets, recipes
from runs.services.recipe_rows import State
from runs.tasks import check_dataset
from tests.worker.conftest import DEADLINE_S, wait_for

TINY = Path(__file__).resolve().parent.parent.parent / "gpuworker" / "tiny" / "model"
BASE_MODEL = "mintweb/tiny"
LEARNS_NOTHING = 1e-30
"""A learning rate at which the validation loss stays what it is."""
ENDED = (State.FINISHED, State.STOPPED, State.DISCARDED, State.FAILED)


@pytest.fixture
def base_model(settings: Settings, tmp_path: Path) -> str:
    """Offer the tiny model alone, on the CPU."""
    settings.BASE_MODELS = {BASE_MODEL: str(TINY)}
    settings.DEVICE, settings.DTYPE = "cpu", "float32"
    return BASE_MODEL


class Staff:
    """The one GPU worker of a test, which may be away for a while."""

    def __init__(self) -> None:
        self._worker: GpuWorker | None = None

    def start(self) -> None:
        self._worker = GpuWorker()
        self._worker.start()

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        self._worker = None


@pytest.fixture
def worker(transactional_db: None, base_model: str) -> Iterator[Staff]:
    """Run a GPU worker in this process."""
    staff = Staff()
    staff.start()
    yield staff
    staff.stop()


@pytest.fixture
def alice(transactional_db: None) -> User:
    """Return a user."""
    return User.objects.create(username="alice")


@pytest.fixture
def add_dataset(alice: User, tmp_path: Path) -> Callable[..., DatasetVersion]:
    """Return a function that uploads rows as JSONL and lets the doctor look at them."""

    def add(rows: Sequence[dict[str, Any]], *, name: str = "questions") -> DatasetVersion:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        version = datasets.create_version(alice, path=path, filename=path.name, dataset=None, name=name)
        check_dataset(version.pk)
        version.refresh_from_db()
        assert version.state == DatasetVersion.State.READY, (version.state, version.error, version.report)
        return version

    return add


def questions(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Return chat rows, each its own."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} + 1?"},
                {"role": "assistant", "content": f"Arr! {number} + 1 = {number + 1}, me hearty!"},
            ]
        }
        for number in range(start, start + count)
    ]


@pytest.fixture
def begin(alice: User, worker: Staff, add_dataset: Callable[..., DatasetVersion]) -> Callable[..., Recipe]:
    """Return a function that starts a run on 40 questions with some settings changed."""
    version = add_dataset(questions(40))

    def start(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "base_model": BASE_MODEL,
            "dataset": f"{version.dataset.public_id}@{version.number}",
            "lora": {"rank": 4},
            "num_steps": 12,
            "batch_size": 4,
            "validation": {"share": 0.1},
        }
        config = SftConfig.model_validate({**values, **changes})
        run = recipes.start(alice, config, name="test", source=TrainingRun.Source.BROWSER)
        return Recipe.objects.get(run=run)

    return start


def read(loop: RecipeLoop, recipe: Recipe) -> None:
    """Wait until the loop has the recipe's data."""
    wait_for(lambda: loop.materials.get(recipe), what="the data")


def turn_until(
    recipe: Recipe,
    condition: Callable[[Recipe], Any],
    *,
    what: str,
    make_loop: Callable[[], RecipeLoop] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Recipe:
    """Turn the loop until the recipe's row is as wanted; with `make_loop`, every turn is a new process's first."""
    loop = RecipeLoop()

    def look() -> Recipe | None:
        nonlocal loop
        if make_loop is not None:
            loop = make_loop()
            read(loop, recipe)
        loop.turn()
        row = Recipe.objects.select_related("run").get(pk=recipe.pk)
        return row if condition(row) else None

    found: Recipe = wait_for(look, what=what, deadline_s=deadline_s)
    return found


def ended(
    recipe: Recipe,
    *,
    make_loop: Callable[[], RecipeLoop] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Recipe:
    """Turn the loop until the run has ended."""
    return turn_until(
        recipe, lambda row: row.state in ENDED, what="the end", make_loop=make_loop, deadline_s=deadline_s
    )
