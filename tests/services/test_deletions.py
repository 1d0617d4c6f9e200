"""Folders that are deleted with their rows go for good, whatever fails at that moment, and none that is needed goes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import IntegrityError, connection, transaction
from django.db.models.functions import Now
from pytest_django.fixtures import Settings

from runs.models import Checkpoint, PendingDeletion, Snapshot, TrainingRun, User
from runs.services import (
    checkpoints,
    commits,
    datasets,
    deletions,
    early_answers,
    expired_operations,
    operations,
    run_deletion,
    storage_mark,
)
from runs.services.claims import HeldRun
from runs.tasks import housekeeping
from tests.services import rows
from tests.services.flaky_bucket import use_flaky_bucket
from tests.services.hand_worker import HandWorker
from tests.services.races import race

OUTSIDE = (
    *("", "/", ".", "..", "/etc/passwd", "/checkpoints/1", "tmp/1", "payloads/ab/abcd"),
    *(
        "checkpoints",
        "checkpoints/",
        "checkpoints/1/",
        "checkpoints/1/..",
        "checkpoints/../x",
        "checkpoints/x",
    ),
    *("datasets", "datasets/.", "datasets/..", "datasets/x/../.."),
)


def write(directory: str) -> str:
    default_storage.save(f"{directory}/state.json", ContentFile(b"{}"))
    return directory


def has_files(directory: str) -> bool:
    return default_storage.exists(f"{directory}/state.json")


def pending() -> list[str]:
    return sorted(PendingDeletion.objects.values_list("path", flat=True))


def let_rest_pass() -> None:
    PendingDeletion.objects.update(due_at=Now())


def refused(number: int) -> str:
    """Return a folder that cannot be deleted: a file is where the folder above it should be."""
    path = Path(default_storage.path(f"snapshots/{number}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no folder")
    return f"snapshots/{number}/1-1-a"


def hold(worker: HandWorker, run: TrainingRun) -> HeldRun:
    rows.optim_step(run, operations.next_seq(run))
    return worker.hold(run)


@pytest.fixture(params=["folder", "bucket"])
def each_kind_of_storage(request: pytest.FixtureRequest, settings: Settings) -> None:
    """Have the test run with files in a folder, and once more with files that are not on a disk."""
    if request.param == "bucket":
        in_memory = {"BACKEND": "django.core.files.storage.InMemoryStorage"}
        settings.STORAGES = {**settings.STORAGES, "default": in_memory}


@pytest.fixture(autouse=True)
def folder(settings: Settings, tmp_path: Path) -> Path:
    """Keep files in a folder of the test's own, with its mark."""
    backend = {
        "BACKEND": "django.core.files.storage.FileSystemStorage",
        "OPTIONS": {"location": tmp_path / "storage"},
    }
    settings.STORAGES = {**settings.STORAGES, "default": backend}
    default_storage.save(storage_mark.NAME, ContentFile(b""))
    return tmp_path / "storage"


@pytest.mark.django_db(transaction=True)
def test_they_go_once_the_transaction_is_committed() -> None:
    one, two = write("snapshots/1/1-1-a"), write("datasets/x")
    with transaction.atomic():
        deletions.add(one, two, one)
        assert pending() == [two, one]
        assert has_files(one)
    assert not has_files(one)
    assert not has_files(two)
    assert pending() == []


@pytest.mark.django_db(transaction=True)
def test_what_is_rolled_back_deletes_nothing(run: TrainingRun) -> None:
    checkpoint = rows.make_checkpoint(run)
    with transaction.atomic():
        checkpoints.delete(checkpoint)
        assert pending() == [checkpoint.directory]
        transaction.set_rollback(True)
    assert pending() == []
    housekeeping()
    assert [name for name, _ in checkpoints.files(checkpoint)] == list(rows.FILES)


@pytest.mark.parametrize(
    "how", ["run", "checkpoint", "snapshot", "ended", "late", "unwanted", "withdrawn", "dataset"]
)
def test_a_process_that_dies_after_the_commit_leaves_nothing_for_long(
    run: TrainingRun, worker: HandWorker, alice: User, how: str, tmp_path: Path
) -> None:
    checkpoint = rows.make_checkpoint(run)
    fence = hold(worker, run).fence
    snapshots = [write(f"snapshots/{run.pk}/{seq}-{fence}-a") for seq in range(3)]
    for seq, directory in enumerate(snapshots[:2]):
        commits.register_snapshot(run.pk, fence=fence, seq=seq, directory=directory, size_bytes=1)
    gone = {
        "run": [checkpoint.directory, *snapshots],
        "checkpoint": [checkpoint.directory],
        "snapshot": snapshots[:1],
        "ended": snapshots[:2],
        "late": snapshots[2:],
        "unwanted": snapshots[2:],
        "withdrawn": snapshots[2:],
    }.get(how) or [_dataset_folder(alice, tmp_path)]

    take_away(run, worker, alice, how=how, checkpoint=checkpoint, new=snapshots[2])

    assert all(
        Path(default_storage.path(each)).exists() for each in gone
    )  # nothing is committed: here it died
    assert all(each.startswith(tuple(pending())) for each in gone)
    deletions.delete_due()
    assert not any(Path(default_storage.path(each)).exists() for each in gone)
    assert pending() == []
    kept = {checkpoint.directory, *snapshots} - set(gone)
    assert all(Path(default_storage.path(each)).exists() for each in kept)


def take_away(
    run: TrainingRun, worker: HandWorker, alice: User, *, how: str, checkpoint: Checkpoint, new: str
) -> None:
    """Make folders useless in one of the ways there are."""
    fence = TrainingRun.objects.get(pk=run.pk).fence
    if how == "run":
        run.operations.update(state="done")
        run_deletion.delete(run)
    elif how == "checkpoint":
        checkpoints.delete(checkpoint)
    elif how in ("snapshot", "late"):
        fence += how == "late"
        commits.register_snapshot(run.pk, fence=fence, seq=2, directory=new, size_bytes=1)
    elif how == "ended":
        run.operations.update(state="done")
        TrainingRun.objects.filter(pk=run.pk).update(state="closed")
        expired_operations.forget()
    elif how == "unwanted":
        assert not early_answers.settle(new, 1)
    elif how == "withdrawn":
        early_answers.withdraw(new)
    else:
        datasets.delete(alice.datasets.get())


def _dataset_folder(user: User, tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "Hello"}\n')
    return datasets.create_version(user, path=path, filename=path.name).directory


@pytest.mark.django_db(transaction=True)
def test_what_the_storage_refuses_is_done_again_until_it_succeeds(settings: Settings) -> None:
    use_flaky_bucket(settings)
    one, two = write("checkpoints/1/1-1-a"), write("checkpoints/1/2-1-a")
    deletions.add(one, two)
    assert [has_files(each) for each in (one, two)] == [True, False]
    assert pending() == [one]
    deletions.delete_due()
    assert has_files(one)  # it rests
    let_rest_pass()
    deletions.delete_due()
    assert not has_files(one)
    assert pending() == []


@pytest.mark.django_db(transaction=True)
def test_housekeeping_does_it_again() -> None:
    wrong = refused(1)
    deletions.add(wrong)
    assert pending() == [wrong]
    let_rest_pass()
    Path(default_storage.path("snapshots/1")).unlink()
    housekeeping()
    assert pending() == []


@pytest.mark.django_db
def test_one_that_always_fails_holds_up_no_other() -> None:
    wrong = [refused(number) for number in range(3)]
    good = [write(f"checkpoints/1/{seq}-1-a") for seq in range(3)]
    for pair in zip(wrong, good, strict=True):
        deletions.add(*pair)
    deletions.delete_due()
    assert not any(has_files(each) for each in good)
    assert pending() == wrong


@pytest.mark.django_db
def test_it_rests_longer_and_longer() -> None:
    deletions.add(refused(1))
    rests = []
    for _ in range(9):
        PendingDeletion.objects.update(due_at=Now() - timedelta(days=1))
        deletions.delete_due()
        (row,) = PendingDeletion.objects.annotate(now=Now())
        rests.append(round((row.due_at - row.now).total_seconds() / 60))
    assert rests == [1, 2, 4, 8, 16, 32, 64, 64, 64]


@pytest.mark.django_db(transaction=True)
def test_many_sweeps_at_once_do_no_harm() -> None:
    good = [write(f"checkpoints/1/{seq}-1-a") for seq in range(20)]
    wrong = refused(1)
    PendingDeletion.objects.bulk_create(PendingDeletion(path=each) for each in [wrong, *good, *good])
    race([deletions.delete_due] * 4)
    assert not any(has_files(each) for each in good)
    (left,) = PendingDeletion.objects.all()
    assert (left.path, left.tries) == (wrong, 1)


@pytest.mark.django_db(transaction=True)
def test_one_that_somebody_holds_is_left_to_them() -> None:
    one, two = write("checkpoints/1/1-1-a"), write("checkpoints/1/2-1-a")
    PendingDeletion.objects.bulk_create([PendingDeletion(path=one), PendingDeletion(path=two)])
    with transaction.atomic():
        PendingDeletion.objects.select_for_update().get(path=one)
        race([delete_due_without_waiting])
        assert pending() == [one]
        assert has_files(one)


def delete_due_without_waiting() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '5s'")
    deletions.delete_due()


@pytest.mark.usefixtures("each_kind_of_storage")
@pytest.mark.django_db
def test_what_is_gone_already_is_done() -> None:
    deletions.add("checkpoints/1/1-1-a", "snapshots/1")
    deletions.delete_due()
    assert pending() == []


def test_on_a_disk_that_is_not_mounted_nothing_counts_as_gone(run: TrainingRun, folder: Path) -> None:
    one, _ = (rows.make_checkpoint(run, name) for name in ("one", "two"))
    checkpoints.delete(one)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    deletions.delete_due()
    assert pending() == [one.directory]
    elsewhere.rename(folder)
    let_rest_pass()
    deletions.delete_due()
    assert pending() == []
    assert not Path(default_storage.path(one.directory)).exists()


def test_what_a_row_names_stays(run: TrainingRun, worker: HandWorker) -> None:
    checkpoint = rows.make_checkpoint(run)
    held = hold(worker, run)
    snapshot = write(f"snapshots/{run.pk}/1-1-a")
    commits.register_snapshot(run.pk, fence=held.fence, seq=1, directory=snapshot, size_bytes=1)
    TrainingRun.objects.filter(pk=run.pk).update(fence=held.fence + 1)
    # Its answer was lost, and somebody else has the run by now.
    commits.register_snapshot(run.pk, fence=held.fence, seq=1, directory=snapshot, size_bytes=1)
    deletions.add(checkpoint.directory)
    deletions.delete_due()
    assert pending() == []
    assert has_files(Snapshot.objects.get().directory)
    assert len(list(checkpoints.files(checkpoint))) == len(rows.FILES)


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.django_db
def test_nothing_else_can_be_entered(path: str) -> None:
    with pytest.raises(IntegrityError, match="pending_deletion_inside_storage"):
        deletions.add(path)


@pytest.mark.usefixtures("each_kind_of_storage")
@pytest.mark.django_db
def test_the_folder_of_a_run_goes_with_those_in_it() -> None:
    inside, beside = write("snapshots/1/1-1-a"), write("snapshots/10/1-1-a")
    deletions.add("snapshots/1")
    deletions.delete_due()
    assert not has_files(inside)
    assert has_files(beside)
