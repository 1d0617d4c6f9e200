"""Two people with keys, the model that ships with mintweb, and rows as training leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pytest_django.fixtures import Settings

from runs.models import DatasetVersion, Recipe, TrainingRun
from runs.services import datasets
from runs.tasks import check_dataset
from tests.pages import recipe_seed, seed
from tests.rest.client import Rest
from tests.rest.receiver import Receiver, receiving

TINY = Path(__file__).resolve().parent.parent.parent / "gpuworker" / "tiny" / "model"
BASE_MODEL = "mintweb/tiny"


@pytest.fixture(autouse=True)
def _tiny(settings: Settings) -> None:
    settings.BASE_MODELS = {BASE_MODEL: str(TINY)}


@pytest.fixture
def alice(db: None) -> Rest:
    """Return the person who asks."""
    return Rest.make("alice")


@pytest.fixture
def bob(db: None) -> Rest:
    """Return somebody else."""
    return Rest.make("bob")


@pytest.fixture
def run(alice: Rest) -> TrainingRun:
    """Return alice's run with 30 steps, which a client trains."""
    run = seed.make_run(alice.user, name="alice's run")
    seed.add_values(run, seed.curve(30))
    seed.add_operations(run)
    return run


@pytest.fixture
def recipe(run: TrainingRun) -> Recipe:
    """Let a recipe train alice's run."""
    return recipe_seed.make_recipe(run)


@pytest.fixture
def add_rows(alice: Rest, tmp_path: Path) -> Callable[..., DatasetVersion]:
    """Return a function that makes a checked dataset of rows."""

    def add(rows: Sequence[dict[str, Any]], *, name: str = "questions") -> DatasetVersion:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        version = datasets.create_version(alice.user, path=path, filename=path.name, name=name)
        check_dataset(version.pk)
        version.refresh_from_db()
        assert version.state == DatasetVersion.State.READY, (version.state, version.error, version.report)
        return version

    return add


@pytest.fixture
def version(add_rows: Callable[..., DatasetVersion]) -> DatasetVersion:
    """Return alice's dataset of ten questions."""
    return add_rows(
        [{"prompt": f"What is {number} + 1?", "completion": str(number + 1)} for number in range(10)]
    )


@pytest.fixture
def receiver(settings: Settings) -> Iterator[Receiver]:
    """Run somebody's web server, on an address that the settings allow."""
    settings.WEBHOOK_HOSTS = ["127.0.0.1"]
    with receiving() as made:
        yield made
