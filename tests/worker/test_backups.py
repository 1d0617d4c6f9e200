"""Backups whose database and files are not of the same moment: a worker starts on them and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from django.db import connection, connections

from mintweb import embedded
from runs.models import Operation, RunEvent, Snapshot, TrainingRun
from runs.services import state_folders, storage_mark
from tests.worker.conftest import Client, Start, finished, wait_for

NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


def train(client: Client) -> int:
    """Submit two steps and return the number of a look at the loss after them."""
    for _ in range(2):
        client.forward_backward(TOKENS)
        client.optim_step()
    return client.forward_backward(TOKENS, forward_only=True)


def result_of(operation_pk: int) -> bytes:
    operation = finished(operation_pk)
    assert operation.state == Operation.State.DONE, operation.error
    return bytes(operation.result or b"")


def tool(name: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs on the test database."""
    parameters = connection.get_connection_params()
    program = embedded.postgres_program(name)
    address = ["--host", str(parameters["host"]), "--username", str(parameters["user"])]
    command = [str(program), *address, "--dbname", str(parameters["dbname"]), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def storage() -> Path:
    return Path(default_storage.path(""))


@pytest.fixture
def expected(start_worker: Start, new_client: NewClient) -> list[bytes]:
    """What an undisturbed run is answered after 2, 4 and 6 steps."""
    client = new_client()
    worker = start_worker()
    answers = [result_of(train(client)) for _ in range(3)]
    worker.stop()
    return answers


def train_one_worker(start_worker: Start, client: Client) -> bytes:
    """Train with a worker of its own, which ends in order and so keeps the state."""
    worker = start_worker()
    answer = result_of(train(client))
    worker.stop()
    return answer


def test_a_database_older_than_the_files(
    start_worker: Start, new_client: NewClient, expected: list[bytes], tmp_path: Path
) -> None:
    client = new_client()
    assert train_one_worker(start_worker, client) == expected[0]
    seq = client.seq
    tool("pg_dump", "--format", "custom", "--file", str(tmp_path / "dump"))
    assert train_one_worker(start_worker, client) == expected[1]
    newer = Snapshot.objects.filter(run=client.run).latest("seq")

    connections.close_all()
    tool("pg_restore", "--clean", "--if-exists", "--single-transaction", str(tmp_path / "dump"))

    assert TrainingRun.objects.get(pk=client.run.pk).applied_seq == seq
    assert Path(default_storage.path(newer.directory)).is_dir()  # a file that no row names does no harm
    client.seq = seq
    assert train_one_worker(start_worker, client) == expected[1]
    assert train_one_worker(start_worker, client) == expected[2]
    state_folders.delete_orphans()
    assert not RunEvent.objects.filter(run=client.run, kind__in=["diverged", "failed"]).exists()


def test_a_database_newer_than_the_files_goes_on_from_an_older_state(
    start_worker: Start, new_client: NewClient, expected: list[bytes], storage: Path, tmp_path: Path
) -> None:
    client = new_client()
    train_one_worker(start_worker, client)
    shutil.copytree(storage, tmp_path / "copy")
    train_one_worker(start_worker, client)
    older, newer = Snapshot.objects.filter(run=client.run).order_by("seq")
    shutil.rmtree(storage)
    shutil.copytree(tmp_path / "copy", storage)
    assert not Path(default_storage.path(newer.directory)).exists()

    assert train_one_worker(start_worker, client) == expected[2]

    event = RunEvent.objects.filter(run=client.run).latest("id")
    assert (event.detail["from_seq"], event.detail["num_replayed"]) == (older.seq, newer.seq - older.seq)


def test_a_database_without_any_files_goes_on_from_the_log(
    start_worker: Start, new_client: NewClient, expected: list[bytes], storage: Path
) -> None:
    client = new_client()
    for _ in range(2):
        train_one_worker(start_worker, client)
    shutil.rmtree(storage)
    waits = train(client)
    worker = start_worker()
    run = TrainingRun.objects.filter(pk=client.run.pk)
    told = wait_for(lambda: run.get().held_up, what="people are told")
    assert storage_mark.AWAY in told  # it looks like a disk that is not mounted

    storage.mkdir()
    (storage / storage_mark.NAME).touch()  # somebody says that it is not

    assert result_of(waits) == expected[2]
    worker.stop()
    assert RunEvent.objects.filter(run=client.run).latest("id").detail["from_seq"] == -1
