"""A run goes on in another worker, or once more in the same, as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import psycopg
from django.core.files.storage import default_storage
from django.db import connection, connections
from django.db.models import F
from psycopg.sql import SQL, Identifier

from gpuworker.engine import checkpoints
from runs.models import Operation, RunEvent, Snapshot, TrainingRun
from runs.services import workers
from tests.worker.conftest import DEADLINE_S, Client, Start, finished, wait_for

NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


@contextmanager
def database_away() -> Iterator[None]:
    """Refuse connections to the test database and end those there are."""
    parameters = connection.get_connection_params()
    name = parameters["dbname"]
    outside = {key: parameters[key] for key in ("host", "port", "user", "password") if parameters.get(key)}
    with psycopg.connect(**outside, dbname="postgres", autocommit=True) as server:
        server.execute(SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS false").format(Identifier(name)))
        try:
            server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = %s AND backend_type = 'client backend'",
                [name],
            )
            yield
        finally:
            server.execute(SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS true").format(Identifier(name)))
            connection.close()  # that of this thread, which has ended


def train(client: Client, *, num_steps: int) -> int:
    """Submit steps and return the number of a last look at the loss."""
    for _ in range(num_steps):
        client.forward_backward(TOKENS)
        client.optim_step()
    return client.forward_backward(TOKENS, forward_only=True)


def result_of(operation_pk: int) -> bytes:
    """Return the answer once it is there."""
    operation = finished(operation_pk)
    assert operation.state == Operation.State.DONE, operation.error
    return bytes(operation.result or b"")


def recovered_from(run: TrainingRun) -> list[int]:
    """Return the seqs that the run was brought back from, -1 for its beginning."""
    events = RunEvent.objects.filter(run=run, kind__in=["recovered", "restored"]).order_by("id")
    return [event.detail["from_seq"] for event in events]


def test_a_run_that_another_worker_took_is_dropped_and_later_rebuilt(
    start_worker: Start, new_client: NewClient
) -> None:
    undisturbed, taken = new_client(), new_client()
    expected = train(undisturbed, num_steps=4)
    worker = start_worker()
    result_of(train(taken, num_steps=2))
    other = workers.register(device="cpu", dtype="float32")  # computes nothing, and is soon found dead
    TrainingRun.objects.filter(pk=taken.run.pk).update(fence=F("fence") + 1, worker=other)

    again = train(taken, num_steps=2)

    wait_for(lambda: taken.run.pk not in worker._intake.seats, what="the run is dropped")
    assert result_of(again) == result_of(expected)
    assert TrainingRun.objects.get(pk=taken.run.pk).fence == 3
    assert recovered_from(taken.run) == [-1]


def test_what_was_accumulated_survives(start_worker: Start, new_client: NewClient) -> None:
    undisturbed, moved = new_client(), new_client()
    worker = start_worker()
    for client in (undisturbed, moved):
        client.forward_backward(TOKENS)
        accumulated = client.forward_backward(TOKENS[:5])
    undisturbed.optim_step()
    expected = result_of(undisturbed.forward_backward(TOKENS))
    result_of(accumulated)
    worker.stop()

    start_worker()

    moved.optim_step()
    assert result_of(moved.forward_backward(TOKENS)) == expected
    assert recovered_from(moved.run) == [2]


def test_a_damaged_snapshot_gives_way_to_the_one_before(start_worker: Start, new_client: NewClient) -> None:
    undisturbed, moved = new_client(), new_client()
    expected = train(undisturbed, num_steps=4)
    for _ in range(2):
        worker = start_worker()
        result_of(train(moved, num_steps=1))
        worker.stop()
    older, newest = Snapshot.objects.filter(run=moved.run).order_by("seq")
    weights = Path(default_storage.path(newest.directory)) / checkpoints.ADAPTER_FILE
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)

    start_worker()

    last = train(moved, num_steps=2)
    assert result_of(last) == result_of(expected)
    assert recovered_from(moved.run)[-1] == older.seq


def test_a_worker_that_starts_while_the_database_is_away_waits_for_it(
    start_worker: Start, new_client: NewClient
) -> None:
    """A worker that ended instead would be given up by supervisord when it had ended five times."""
    operation = new_client().forward_backward(TOKENS)
    with ThreadPoolExecutor(1) as threads:
        with database_away():
            starting = threads.submit(start_worker)
            assert not wait([starting], timeout=1.0).done
        starting.result(timeout=DEADLINE_S)
        threads.submit(connections.close_all).result()
    result_of(operation)
