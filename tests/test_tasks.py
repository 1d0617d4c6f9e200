"""Housekeeping: what goes wrong with one thing holds up nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from django.db.models.functions import Now

from runs.models import IdempotentReply, TrainingRun, User, Worker
from runs.services import state_folders
from runs.tasks import housekeeping
from tests.services import rows


@pytest.fixture
def run(admin: User) -> TrainingRun:
    """Return a run on a worker that is gone."""
    worker = rows.make_worker()
    run = rows.make_run(admin)
    Worker.objects.filter(pk=worker.pk).update(lease_until=Now() - timedelta(seconds=1))
    return run


@pytest.fixture
def in_the_way(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a file where the folder of the run's checkpoints is looked for; every run has its turn at once."""
    monkeypatch.setattr(state_folders, "NUM_TURNS", 1)
    path = Path(default_storage.path(f"checkpoints/{run.pk}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("no folder")
    yield path
    path.unlink(missing_ok=True)


def test_a_chore_that_fails_is_told_and_holds_up_no_other(
    admin: User, in_the_way: Path, caplog: pytest.LogCaptureFixture
) -> None:
    IdempotentReply.objects.create(owner=admin, key="a", request_digest="0", created_at=Now() - timedelta(2))
    with pytest.raises(ExceptionGroup) as failure:
        housekeeping()
    assert [type(error) for error in failure.value.exceptions] == [NotADirectoryError]
    assert "runs.services.state_folders.delete_orphans failed" in caplog.text
    assert not IdempotentReply.objects.exists()
    assert not Worker.objects.filter(stopped_at=None).exists()
    in_the_way.unlink()
    housekeeping()
