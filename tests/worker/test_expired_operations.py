"""What housekeeping deletes of the log is never what a worker needs to bring a run back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from pytest_django.fixtures import Settings

from runs.models import Operation, RunEvent, Snapshot, TrainingRun
from runs.services import expired_operations
from tests.worker.conftest import Client, Start, finished, losses_of

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]


def train(client: Client, num_steps: int = 3) -> int:
    last = 0
    for index in range(num_steps):
        last = client.forward_backward(TOKENS[index % 3 :])
        client.optim_step()
    return last


@pytest.fixture
def aged(start_worker: Start, new_client: Callable[..., Client], settings: Settings) -> tuple[Client, Client]:
    """Return a run with two kept snapshots and some operations after them, its old payloads gone; and its twin."""
    settings.INLINE_PAYLOAD_BYTES = 4
    client, twin = new_client(seed=1), new_client(seed=1)
    for _ in range(2):
        worker = start_worker()
        for one in (client, twin):
            finished(train(one))
            finished(one.optim_step())
        worker.stop()
    worker = start_worker()
    for one in (client, twin):
        finished(train(one, 2))
    names = list(Operation.objects.filter(run=client.run).values_list("payload_file", flat=True))
    for name in filter(None, names):
        os.utime(default_storage.path(name), (0, 0))
    worker.give_up(client.run.pk)
    older = Snapshot.objects.filter(run=client.run).order_by("seq").first()
    assert older is not None
    Operation.objects.filter(run=client.run).update(finished_at="2000-01-01T00:00Z")
    expired_operations.forget()
    kept = Operation.objects.filter(run=client.run).exclude(payload_file="").values_list("seq", flat=True)
    assert min(kept) == older.seq + 1
    assert [name for name in set(names) if name and default_storage.exists(name)]
    return client, twin


def test_the_run_goes_on_as_if_nothing_was_deleted(aged: tuple[Client, Client]) -> None:
    client, twin = aged
    assert finished(train(client)).result == finished(train(twin)).result
    assert not RunEvent.objects.filter(run=client.run, kind="diverged").exists()


def test_it_goes_on_from_the_older_snapshot_when_the_newer_is_torn(
    aged: tuple[Client, Client], start_worker: Start
) -> None:
    client, twin = aged
    newer = Snapshot.objects.filter(run=client.run).order_by("-seq").first()
    assert newer is not None
    for path in Path(default_storage.path(newer.directory)).iterdir():
        path.write_bytes(b"torn")
    assert finished(train(client)).result == finished(train(twin)).result
    assert not RunEvent.objects.filter(run=client.run, kind="diverged").exists()


def test_without_any_snapshot_it_fails_in_words_and_others_go_on(aged: tuple[Client, Client]) -> None:
    client, twin = aged
    for snapshot in Snapshot.objects.filter(run=client.run):
        shutil.rmtree(default_storage.path(snapshot.directory))
    lost = finished(client.forward_backward(TOKENS))
    assert (lost.state, lost.error_category) == ("failed", "server")
    run = TrainingRun.objects.get(pk=client.run.pk)
    assert (run.state, run.error) == (
        "failed",
        "none of the run's kept states can be read, and the operations before them are deleted",
    )
    assert losses_of(finished(twin.forward_backward(TOKENS))) > 0
