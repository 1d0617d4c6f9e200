"""What dead workers leave in storage is removed, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage

from runs.models import TrainingRun
from runs.services import claims, commits, state_folders
from runs.services.claims import HeldRun
from tests.services.hand_worker import HandWorker


@pytest.fixture
def held(run: TrainingRun, worker: HandWorker, monkeypatch: pytest.MonkeyPatch) -> HeldRun:
    """Claim the run twice: its fence is 2 then. Every run has its turn at once."""
    monkeypatch.setattr(state_folders, "NUM_TURNS", 1)
    worker.hold(run)
    worker.release(run)
    return worker.hold(run)


def write(directory: str) -> str:
    default_storage.save(f"{directory}/state.json", ContentFile(b"{}"))
    return directory


def remaining(kind: str, run: TrainingRun) -> Iterator[str]:
    folder = Path(default_storage.path(f"{kind}/{run.pk}"))
    return (path.name for path in folder.iterdir()) if folder.exists() else iter(())


def test_what_a_former_owner_left_without_a_row_goes(run: TrainingRun, held: HeldRun) -> None:
    entered, lost = write(f"snapshots/{run.pk}/5-1-aaaaaaaa"), write(f"snapshots/{run.pk}/6-1-bbbbbbbb")
    torn = write(f"snapshots/{run.pk}/.7-1-cccccccc.x1_yz")
    commits.register_snapshot(run.pk, fence=held.fence, seq=5, directory=entered, size_bytes=1)
    assert state_folders.delete_orphans() >= 2
    assert list(remaining("snapshots", run)) == ["5-1-aaaaaaaa"]
    assert not default_storage.exists(lost)
    assert not default_storage.exists(torn)


def test_what_the_owner_may_yet_enter_stays(run: TrainingRun, held: HeldRun) -> None:
    write(f"checkpoints/{run.pk}/5-2-aaaaaaaa")
    write(f"checkpoints/{run.pk}/.6-2-bbbbbbbb.tmp")
    write(f"checkpoints/{run.pk}/somebody's")
    state_folders.delete_orphans()
    assert len(list(remaining("checkpoints", run))) == 3


def test_what_the_last_owner_of_a_free_run_left_goes_and_nothing_can_be_entered_for_it(
    run: TrainingRun, worker: HandWorker, held: HeldRun
) -> None:
    left, entered = write(f"snapshots/{run.pk}/5-2-aaaaaaaa"), write(f"snapshots/{run.pk}/4-2-bbbbbbbb")
    commits.register_snapshot(run.pk, fence=held.fence, seq=4, directory=entered, size_bytes=1)
    worker.release(run)
    assert state_folders.delete_orphans() >= 1
    assert list(remaining("snapshots", run)) == ["4-2-bbbbbbbb"]
    assert commits.register_snapshot(run.pk, fence=held.fence, seq=5, directory=left, size_bytes=1) == [left]


def test_the_folders_of_a_deleted_run_go_whole(run: TrainingRun, held: HeldRun) -> None:
    write(f"checkpoints/{run.pk}/5-2-aaaaaaaa")
    pk = run.pk
    run.operations.all().delete()
    run.delete()
    state_folders.delete_orphans()
    assert not Path(default_storage.path(f"checkpoints/{pk}")).exists()
    assert claims.latest_snapshots(pk, up_to_seq=9) == []


def test_without_any_folder_there_is_nothing_to_do(held: HeldRun) -> None:
    assert state_folders.delete_orphans() >= 0
