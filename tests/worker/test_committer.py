"""States that wait to be written take a bounded part of the memory, and of two for one place the second one goes."""

from __future__ import annotations

import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from django.core.files.storage import default_storage
from django.db import connection, transaction
from django.db.models.functions import Now

from gpuworker import handlers, outcomes, snapshots
from gpuworker.committer import Committer
from gpuworker.engine.adapters import AdapterState
from gpuworker.outcomes import RunOutcome, SampleOutcome, SnapshotOutcome
from gpuworker.seats import PreparedOperation, Save, Seat
from gpuworker.worker import GpuWorker
from runs.models import Checkpoint, Operation, PendingDeletion, Snapshot, TrainingRun, User, Worker
from runs.services import workers
from runs.services.commits import Result
from tests.worker.conftest import Client, finished, wait_for
from tests.worker.test_device_share import TOKENS, ask

NUM_RUNS = 5


@dataclass(frozen=True)
class Held:
    """A seat with a trained adapter, and a committer of its own that has room for one of its states."""

    seat: Seat
    committer: Committer

    def state(self) -> AdapterState:
        """Return a copy of the adapter."""
        return self.seat.engine.export_state(self.seat.adapter_id, optimizer=True, gradients=True)

    def outcome(self, seq: int) -> SnapshotOutcome:
        """Return a snapshot of the adapter under a seq."""
        return SnapshotOutcome(seat=self.seat, seq=seq, state=self.state(), copy_s=0.0)

    def keep(self, seq: int) -> None:
        """Keep a snapshot under a seq, and wait until that is done."""
        self.committer.put(self.outcome(seq))
        self.committer.flush()

    def folders(self) -> set[str]:
        """Return the folders of snapshots that lie in storage."""
        path = Path(default_storage.path(f"snapshots/{self.seat.run.pk}"))
        return {f"snapshots/{self.seat.run.pk}/{one.name}" for one in path.iterdir()}


@pytest.fixture
def held(start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client]) -> Iterator[Held]:
    worker, client = start_worker(), new_client()
    client.forward_backward(TOKENS)
    finished(client.optim_step())
    seat = worker._intake.seats[client.run.pk]
    size = seat.engine.export_state(seat.adapter_id, optimizer=True, gradients=True).num_bytes
    committer = Committer(on_lost=lambda: None, on_sample_end=lambda _: None, state_bytes=size)
    yield Held(seat, committer)
    committer.stop()


def test_the_size_of_a_state_is_that_of_its_copies(held: Held) -> None:
    state = held.state()
    assert state.optimizer is not None
    assert state.gradient is None
    assert state.num_bytes == 3 * state.weights.nbytes
    whole = AdapterState(**{**vars(state), "gradient": torch.zeros_like(state.weights)})
    assert whole.num_bytes == 4 * state.weights.nbytes
    assert AdapterState(**{**vars(state), "optimizer": None}).num_bytes == state.weights.nbytes


def test_states_wait_for_those_before_them_to_be_written(held: Held) -> None:
    handed_over: list[int] = []

    def produce() -> None:
        for seq in range(100, 103):
            held.committer.put(held.outcome(seq))
            handed_over.append(seq)

    def is_stopped() -> bool:
        does_producer_wait = held.committer._queue._is_taken and held.committer._queue._changed._waiters  # type: ignore[attr-defined]
        return bool(does_producer_wait) or len(handed_over) == 3

    producer = threading.Thread(target=produce)
    with transaction.atomic():
        TrainingRun.objects.select_for_update().get(pk=held.seat.run.pk)  # nothing is entered meanwhile
        producer.start()
        wait_for(is_stopped, what="it waits, or all are handed over")
        assert handed_over == [100]
    producer.join()
    held.committer.flush()
    assert handed_over == [100, 101, 102]
    assert held.committer._queue._held_bytes == 0
    assert Snapshot.objects.filter(run_id=held.seat.run.pk, seq=102).exists()


def test_what_has_no_state_does_not_wait_for_states(held: Held) -> None:
    held.committer._queue.state_bytes = 1
    producer = threading.Thread(target=held.committer.put, args=[[]])
    with transaction.atomic():
        TrainingRun.objects.select_for_update().get(pk=held.seat.run.pk)
        held.committer.put(held.outcome(100))
        producer.start()
        wait_for(lambda: not producer.is_alive(), what="it is handed over")


def test_a_state_that_is_written_is_forgotten(held: Held) -> None:
    outcome = held.outcome(100)
    reference = weakref.ref(outcome.state)
    held.committer.put(outcome)
    del outcome
    held.committer.flush()
    assert reference() is None


def test_the_default_is_a_part_of_what_is_free() -> None:
    assert 0 < outcomes._default_state_bytes() <= outcomes._MAX_STATE_BYTES


def test_a_cycle_copies_no_more_states_than_may_wait(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client]
) -> None:
    worker = start_worker()
    clients = [new_client(seed=seed) for seed in range(NUM_RUNS)]
    for client in clients:
        finished(client.forward_backward(TOKENS))
    drive, seats = worker.scheduler, worker._intake.seats
    drive._committer._queue.state_bytes = 1
    with drive._draining:
        saves = [client.save("kept") for client in clients]
        wait_for(lambda: all(seat.queue for seat in list(seats.values())), what="every save is decoded")
        left = []
        for _ in range(NUM_RUNS):
            assert drive._cycle()
            left.append(sum(len(seat.queue) for seat in seats.values()))
    assert left == list(range(NUM_RUNS - 1, -1, -1))
    assert all(finished(save).state == Operation.State.DONE for save in saves)


def test_of_two_snapshots_after_one_operation_the_second_ones_folder_goes(held: Held) -> None:
    seat = held.seat
    held.keep(100)
    first = seat.snapshot_directory
    assert held.folders() == {first}
    held.keep(100)
    assert seat.snapshot_directory == first
    assert seat.snapshot_seq == 100
    assert held.folders() == {first}
    assert Snapshot.objects.get(run_id=seat.run.pk).directory == first


def test_a_seat_that_does_not_know_its_snapshot_is_told_of_the_one_that_counts(held: Held) -> None:
    seat = held.seat
    held.keep(100)
    first = seat.snapshot_directory
    seat.snapshot_seq, seat.snapshot_directory = -1, ""
    held.keep(100)
    assert (seat.snapshot_seq, seat.snapshot_directory) == (100, first)
    assert held.folders() == {first}


def test_a_snapshot_of_a_run_that_others_have_by_now_counts_for_nothing(held: Held) -> None:
    seat = held.seat
    TrainingRun.objects.filter(pk=seat.run.pk).update(fence=seat.run.fence + 1)
    held.keep(100)
    assert seat.snapshot_seq == -1
    assert seat.snapshot_directory == ""
    assert held.folders() == set()


def saved(held: Held) -> RunOutcome:
    """Return what a cycle did that saved the run's weights."""
    save = Save(kind=Checkpoint.Kind.TRAINING, name="kept")
    operation = PreparedOperation(seq=held.seat.applied_seq + 1, request=save, taken=None)
    outcome = handlers.single(held.seat, operation)
    return RunOutcome(seat=held.seat, from_seq=held.seat.applied_seq, outcomes=[outcome])


def folder_of(run: RunOutcome) -> Path:
    (outcome,) = run.outcomes
    assert outcome.checkpoint is not None
    return Path(default_storage.path(outcome.checkpoint.directory))


def test_files_of_a_save_that_others_do_by_now_are_deleted(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written, store = saved(held), list[bool](), snapshots.store

    def store_and_look(*args: Any) -> int:
        size = store(*args)
        written.append(folder_of(run).is_dir())
        return size

    monkeypatch.setattr(snapshots, "store", store_and_look)
    TrainingRun.objects.filter(pk=held.seat.run.pk).update(fence=held.seat.run.fence + 1)
    held.committer.put([run])
    held.committer.flush()
    assert held.seat.is_lost
    assert written == [True]
    assert not folder_of(run).exists()
    assert not PendingDeletion.objects.exists()


def test_files_of_a_save_whose_commit_was_not_confirmed_stay(held: Held) -> None:
    """It came about, and another worker has the run since."""
    run = saved(held)
    held.committer.put([run])
    held.committer.flush()
    TrainingRun.objects.filter(pk=held.seat.run.pk).update(fence=held.seat.run.fence + 1)
    held.committer.put([run])  # once more, as after an answer that was lost
    held.committer.flush()
    assert held.seat.is_lost
    assert Checkpoint.objects.get(run_id=held.seat.run.pk).name == "kept"
    assert folder_of(run).is_dir()
    assert not PendingDeletion.objects.exists()


@pytest.mark.parametrize("num_looks", [1, 2])
def test_a_disk_that_fills_up_meanwhile_leaves_no_save_uncommitted(
    start_worker: Callable[[], GpuWorker],
    new_client: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
    num_looks: int,
) -> None:
    worker, client = start_worker(), new_client()
    finished(client.forward_backward(TOKENS))
    free = iter([1 << 50] * num_looks)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(free, 0)))
    save = client.save_ephemeral(0)
    assert finished(save, deadline_s=20).state == Operation.State.DONE
    assert not worker._intake.seats[client.run.pk].is_lost


def test_names_are_forgotten_once_they_are_rows(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client]
) -> None:
    worker, client = start_worker(), new_client()
    for number in range(3):
        for save in (client.save(f"kept{number}"), client.save_ephemeral(number)):
            assert finished(save).state == Operation.State.DONE
        worker._committer.flush()
    again = client.save("kept0")
    assert finished(again).error == "a checkpoint named 'kept0' exists; choose another name or overwrite it"
    assert len(worker._intake.seats[client.run.pk].saved_names) <= 2


def test_samples_that_end_together_are_stored_together_and_compute_does_not_wait(
    held: Held, alice: User, base_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with transaction.atomic():  # no worker sees them
        samples = [ask(alice, base_model, num_tokens=1) for _ in range(3 * outcomes.MAX_WAITING)]
        Operation.objects.filter(pk__in=samples).update(worker=live_worker())
    may_go_on, commit = threading.Event(), held.committer._commit

    def commit_later(item: Any) -> None:
        may_go_on.wait(60)
        commit(item)

    monkeypatch.setattr(held.committer, "_commit", commit_later)
    held.committer.put(held.outcome(seq=held.seat.applied_seq))
    answers = [SampleOutcome(operation_pk=pk, answer=Result(body=b"{}")) for pk in samples]

    def put_all() -> None:
        for answer in answers:
            held.committer.put(answer)

    putting = threading.Thread(target=put_all)
    putting.start()
    putting.join(30)
    assert not putting.is_alive()
    may_go_on.set()
    held.committer.flush()
    assert Operation.objects.filter(pk__in=samples, state=Operation.State.DONE).count() == len(samples)
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(DISTINCT xmin::text) FROM runs_operation WHERE id = ANY(%s)", [samples])
        assert cursor.fetchone() == (1,)


def live_worker() -> Worker:
    """Return a worker that keeps what it has taken from others."""
    row = workers.register(device="cpu", dtype="float32")
    Worker.objects.filter(pk=row.pk).update(
        lease_until=Now() + timedelta(days=1), started_at=Now() + timedelta(days=1)
    )
    return row
