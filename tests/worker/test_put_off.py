"""A run that cannot be brought back just now is tried again later: what lies in storage may be whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from django.core.files.storage import default_storage
from django.db.models.functions import Now
from pytest_django.fixtures import Settings

from gpuworker.engine import checkpoints
from gpuworker.worker import GpuWorker
from runs.models import Checkpoint, Operation, RunEvent, Snapshot, TrainingRun, User
from runs.services import blobs, claims, restores, run_rows, storage_mark, waiting
from runs.services.run_rows import RunFacts
from tests.worker.conftest import LONG_S, Client, Start, StartProcess, finished, losses_of, wait_for
from tests.worker.test_device_share import ask

NewClient = Callable[..., Client]
LONG_RESTS = restores.FREE_TRIES + 10
UNREADABLE = "the checkpoint cannot be read: is a directory"
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


@contextmanager
def unreadable(name: str) -> Iterator[None]:
    """Let reading a stored file fail, but not as one that is missing or torn does: a folder lies in its place."""
    path = Path(default_storage.path(name))
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()
        aside.rename(path)


def trained(client: Client) -> int:
    """Train one step and return the number of its operation."""
    client.forward_backward(TOKENS)
    return client.optim_step()


def begun(start_worker: Start, new_client: NewClient) -> tuple[GpuWorker, Client, Client]:
    """Return a worker and two runs of it that are alike, each with a step; the second is not disturbed."""
    client, undisturbed = new_client(), new_client()
    worker = start_worker()
    for one in (client, undisturbed):
        finished(trained(one))
    return worker, client, undisturbed


def wait_until_put_off(worker: GpuWorker, client: Client, *, why: str) -> None:
    """Wait until it is tried again later, and people are told why: on its page, and its client in the terminal."""
    seats = worker._intake.seats
    wait_for(
        lambda: (seat := seats.get(client.run.pk)) is not None and seat.restoring.pause_s,
        what="the run is put off",
    )
    told = wait_for(lambda: facts_of(client).reason, what="the page says why")
    assert told == f"{why}; bringing the run back is tried again by itself, and nothing is lost"
    assert facts_of(client).row.status == "held up"
    queued = Operation.objects.filter(run=client.run, state=Operation.State.QUEUED)
    assert [waiting.reason_of(operation) for operation in queued] == [told]


def facts_of(client: Client) -> RunFacts:
    return run_rows.facts_of(run_rows.with_facts(client.run.owner).get(pk=client.run.pk))


def end_as_undisturbed(client: Client, undisturbed: Client) -> None:
    """Let both go on and compare them."""
    answers = [one.forward_backward(TOKENS) for one in (client, undisturbed)]
    losses = [losses_of(finished(answer)) for answer in answers]
    assert losses[0] == losses[1]
    assert TrainingRun.objects.get(pk=client.run.pk).state == TrainingRun.State.OPEN
    assert (facts_of(client).reason, facts_of(client).row.status) == ("", "running")
    assert not RunEvent.objects.filter(run=client.run, kind="diverged").exists()


def test_snapshots_that_cannot_be_read_do_not_end_the_run(start_worker: Start, new_client: NewClient) -> None:
    worker, client, undisturbed = begun(start_worker, new_client)
    worker.stop()
    kept = Snapshot.objects.get(run=client.run)
    TrainingRun.objects.filter(pk=client.run.pk).update(payloads_gone_seq=kept.seq)
    worker = start_worker()
    with unreadable(f"{kept.directory}/{checkpoints.STATE_FILE}"):
        waits = client.forward_backward(TOKENS)
        wait_until_put_off(worker, client, why=UNREADABLE)
        finished(undisturbed.forward_backward(TOKENS))  # others go on meanwhile
        assert Operation.objects.get(pk=waits).state == Operation.State.QUEUED

    assert finished(waits).state == Operation.State.DONE
    end_as_undisturbed(client, undisturbed)
    assert RunEvent.objects.get(run=client.run, kind="restored").detail["from_seq"] == kept.seq


@contextmanager
def unmounted() -> Iterator[Path]:
    """Have an empty folder where the storage was, as below a disk that is not mounted."""
    root = Path(default_storage.path(""))
    aside = root.with_name("storage.aside")
    root.rename(aside)
    root.mkdir()
    try:
        yield root
    finally:
        root.rmdir()
        aside.rename(root)


def test_a_disk_that_is_not_mounted_does_not_end_the_run(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 0
    worker, client, undisturbed = begun(start_worker, new_client)
    worker.stop()
    waits = client.forward_backward(TOKENS)
    with unmounted() as root:
        start_worker()
        reason = wait_for(lambda: facts_of(client).reason, what="people are told")
        assert reason == (
            f"the payload of operation 3 cannot be read: {storage_mark.AWAY}; "
            "reading it is tried again by itself, and nothing is lost"
        )
        with pytest.raises(OSError, match=storage_mark.NAME):
            blobs.put("ab" * 32, b"below the disk's place")
        assert list(root.iterdir()) == []

    assert finished(waits).state == Operation.State.DONE
    finished(undisturbed.forward_backward(TOKENS))
    end_as_undisturbed(client, undisturbed)


def test_a_kept_state_on_a_disk_that_is_not_mounted_is_not_gone(
    start_worker: Start, new_client: NewClient
) -> None:
    worker, client, undisturbed = begun(start_worker, new_client)
    worker.stop()
    kept = Snapshot.objects.get(run=client.run)
    TrainingRun.objects.filter(pk=client.run.pk).update(payloads_gone_seq=kept.seq)
    with unmounted():
        worker = start_worker()
        waits = client.forward_backward(TOKENS)
        wait_until_put_off(worker, client, why=f"the checkpoint cannot be read: {storage_mark.AWAY}")

    assert finished(waits).state == Operation.State.DONE
    finished(undisturbed.forward_backward(TOKENS))
    end_as_undisturbed(client, undisturbed)


def test_a_payload_that_cannot_be_read_does_not_end_the_run(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 0
    client, undisturbed = new_client(), new_client()
    worker = start_worker()
    first = client.forward_backward(TOKENS)
    finished(client.optim_step())
    finished(trained(undisturbed))
    with unreadable(Operation.objects.get(pk=first).payload_file):
        worker.give_up(client.run.pk)
        waits = client.forward_backward(TOKENS)
        wait_until_put_off(worker, client, why="the payload of operation 1 cannot be read: is a directory")
        finished(undisturbed.forward_backward(TOKENS))

    assert finished(waits).state == Operation.State.DONE
    end_as_undisturbed(client, undisturbed)


def test_an_operation_whose_payload_cannot_be_read_waits_for_it(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 0
    worker, client, undisturbed = begun(start_worker, new_client)
    worker.stop()
    waits, step = client.forward_backward(TOKENS), client.optim_step()
    with unreadable(Operation.objects.get(pk=waits).payload_file):
        start_worker()
        reason = wait_for(lambda: facts_of(client).reason, what="people are told")
        assert reason == (
            "the payload of operation 3 cannot be read: is a directory; "
            "reading it is tried again by itself, and nothing is lost"
        )
        finished(trained(undisturbed))  # others go on meanwhile
        queued = Operation.objects.filter(pk__in=[waits, step], state=Operation.State.QUEUED)
        assert [operation.attempts for operation in queued] == [1, 1]

    assert [finished(pk).state for pk in (waits, step)] == [Operation.State.DONE] * 2
    end_as_undisturbed(client, undisturbed)


def test_an_operation_whose_payload_is_gone_fails_alone(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 0
    client = new_client()
    lost, step = client.forward_backward(TOKENS), client.optim_step()
    Path(default_storage.path(Operation.objects.get(pk=lost).payload_file)).unlink()
    start_worker()
    failed = finished(lost)
    assert (failed.state, failed.error) == (
        Operation.State.FAILED,
        "the operation's payload cannot be read: FileNotFoundError",
    )
    assert finished(step).state == Operation.State.DONE


def test_a_sample_whose_payload_cannot_be_read_waits_for_it(
    start_worker: Start, alice: User, base_model: str, settings: Settings
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 0
    waits, other = (ask(alice, base_model, num_tokens=5 + number) for number in range(2))
    with unreadable(Operation.objects.get(pk=waits).payload_file):
        worker = start_worker()
        wait_for(lambda: worker._intake.samples.num_unread, what="it is put off")
        assert finished(other).state == Operation.State.DONE
        assert Operation.objects.get(pk=waits).state == Operation.State.QUEUED
    assert finished(waits).state == Operation.State.DONE
    assert not worker._intake.samples.num_unread


def test_a_checkpoint_that_cannot_be_read_again_does_not_end_the_run(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.REPLAY = "fast"
    client, undisturbed = new_client(), new_client()
    worker = start_worker()
    for one in (client, undisturbed):
        trained(one)
        finished(one.save("kept"))
    kept = Checkpoint.objects.get(run=client.run)
    finished(client.load(kept.directory, "tinker://kept", optimizer=True))
    snapshot = Snapshot.objects.filter(run=client.run)
    wait_for(snapshot.exists, what="a snapshot of what was loaded")
    snapshot.delete()
    with unreadable(f"{kept.directory}/{checkpoints.STATE_FILE}"):
        worker.give_up(client.run.pk)
        waits = client.forward_backward(TOKENS)
        wait_until_put_off(worker, client, why=UNREADABLE)
        finished(undisturbed.forward_backward(TOKENS))

    assert finished(waits).state == Operation.State.DONE
    end_as_undisturbed(client, undisturbed)


def test_a_checkpoint_that_cannot_be_read_just_now_is_loaded_later(
    start_worker: Start, new_client: NewClient
) -> None:
    client, undisturbed = new_client(), new_client()
    start_worker()
    for one in (client, undisturbed):
        trained(one)
        finished(one.save("kept"))
        finished(trained(one))
    kept, others = (Checkpoint.objects.get(run=one.run) for one in (client, undisturbed))
    finished(undisturbed.load(others.directory, "tinker://kept", optimizer=True))
    with unreadable(f"{kept.directory}/{checkpoints.STATE_FILE}"):
        loads, waits = client.load(kept.directory, "tinker://kept", optimizer=True), trained(client)
        told = wait_for(lambda: facts_of(client).reason, what="people are told")
        assert told == f"{UNREADABLE}; reading it is tried again by itself, and nothing is lost"
        finished(trained(undisturbed))  # others go on meanwhile
        queued = Operation.objects.filter(pk__in=[loads, waits], state=Operation.State.QUEUED)
        assert queued.count() == 2

    assert [finished(pk).state for pk in (loads, waits)] == [Operation.State.DONE] * 2
    end_as_undisturbed(client, undisturbed)


def test_waiting_for_storage_is_one_lone_attempt(start_worker: Start, new_client: NewClient) -> None:
    """An operation that three workers had taken is not given up for that."""
    client = new_client()
    worker = start_worker()
    trained(client)
    finished(client.save("kept"))
    kept = Checkpoint.objects.get(run=client.run)
    worker.stop()
    loads = client.load(kept.directory, "tinker://kept", optimizer=True)
    Operation.objects.filter(pk=loads).update(attempts=3)
    with unreadable(f"{kept.directory}/{checkpoints.STATE_FILE}"):
        worker = start_worker()
        seats = worker._intake.seats
        wait_for(
            lambda: (seat := seats.get(client.run.pk)) is not None and seat.restoring.pause_s >= 4,
            what="it is tried three times",
        )
        assert Operation.objects.get(pk=loads).lone_attempts == 1
    assert finished(loads).state == Operation.State.DONE


def test_a_shelved_state_that_cannot_be_read_stays_the_runs_state(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.ADAPTER_MEMORY_MB = 1  # two of this rank
    client, undisturbed = new_client(rank=32), new_client(rank=32)
    worker = start_worker()
    for one in (client, undisturbed):
        finished(trained(one))
    for seed in range(2):
        finished(trained(new_client(seed=seed, rank=32)))
    kept = wait_for(lambda: Snapshot.objects.filter(run=client.run).first(), what="the run is shelved")
    with unreadable(f"{kept.directory}/{checkpoints.STATE_FILE}"):
        waits = client.forward_backward(TOKENS)
        wait_until_put_off(worker, client, why=UNREADABLE)

    assert finished(waits).state == Operation.State.DONE
    finished(undisturbed.forward_backward(TOKENS))
    end_as_undisturbed(client, undisturbed)
    assert TrainingRun.objects.get(pk=client.run.pk).fence == 1


def test_a_state_without_room_waits_for_it(
    start_worker: Start, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, client, undisturbed = begun(start_worker, new_client)
    worker.stop()
    worker = start_worker()
    engine, has_room = worker.scheduler._engines[client.run.base_model], threading.Event()
    import_state = engine.import_state

    def import_where_room(*args: Any, **kwargs: Any) -> None:
        if not has_room.is_set():
            torch.empty(2**50)  # the allocator really refuses
        import_state(*args, **kwargs)

    monkeypatch.setattr(engine, "import_state", import_where_room)
    client.forward_backward(TOKENS)
    wait_until_put_off(worker, client, why="the worker's memory has no room for the run")
    has_room.set()

    undisturbed.forward_backward(TOKENS)
    end_as_undisturbed(client, undisturbed)


def test_an_error_that_nobody_expects_keeps_one_run_out_and_no_other(
    start_worker: Start, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, client, undisturbed = begun(start_worker, new_client)
    is_repaired, latest = threading.Event(), claims.latest_snapshots

    def look(run_pk: int, *, up_to_seq: int) -> list[tuple[int, str]]:
        if run_pk == client.run.pk and not is_repaired.is_set():
            raise TypeError("a fault of our own")
        return latest(run_pk, up_to_seq=up_to_seq)

    monkeypatch.setattr(claims, "latest_snapshots", look)
    worker.give_up(client.run.pk)
    client.forward_backward(TOKENS)
    why = "the worker met an error of its own (TypeError), which its log describes"
    wait_until_put_off(worker, client, why=why)
    finished(undisturbed.forward_backward(TOKENS))
    is_repaired.set()
    end_as_undisturbed(client, undisturbed)


def test_a_run_that_ends_its_workers_rests_and_others_go_on(
    start_process: StartProcess, new_client: NewClient
) -> None:
    client, other = new_client(), new_client()
    former = start_process()
    for one in (client, other):
        finished(trained(one), deadline_s=LONG_S)
    former.kill()
    former.wait()
    TrainingRun.objects.filter(pk=client.run.pk).update(restore_tries=LONG_RESTS)
    waits = client.forward_backward(TOKENS)
    dying = start_process(MINTWEB_FAILPOINTS="during_replay:kill@1")
    assert dying.wait(LONG_S) == -signal.SIGKILL

    living = start_process()
    finished(trained(other), deadline_s=LONG_S)
    assert facts_of(client).reason == restores.HELD_UP
    assert Operation.objects.get(pk=waits).state == Operation.State.QUEUED
    TrainingRun.objects.filter(pk=client.run.pk).update(rests_until=Now())
    assert finished(waits, deadline_s=LONG_S).state == Operation.State.DONE
    assert facts_of(client).reason == ""
    assert living.poll() is None
