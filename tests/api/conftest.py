"""Fixtures of the endpoint tests: users with keys and what they own, in rows that are really committed.

The API's threads have database connections of their own, so nothing here runs in a transaction that
is rolled back. Instead every test makes users of its own, and the tables are emptied once a module:
emptying them takes longer than most tests.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from django.core.management import call_command
from django.db import connection
from django.db.backends.base.creation import TEST_DATABASE_PREFIX
from django.test import Client
from django.test.utils import setup_databases
from pytest_django.plugin import DjangoDbBlocker

from runs.api import decorators
from runs.models import Checkpoint, SamplingSession, Session, TrainingRun, Worker
from runs.services import base_models, workers
from tests.api.client import Actor
from tests.api.tus import PAGES, Tus, rows_of
from tests.services import rows
from tests.services.hand_worker import HandWorker


@pytest.fixture(scope="session")
def database(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """Let tests commit; at the end close what the API's threads hold open, so that the database can be dropped."""
    with django_db_blocker.unblock():
        if not connection.settings_dict["NAME"].startswith(TEST_DATABASE_PREFIX):  # only these tests run
            setup_databases(verbosity=0, interactive=False, keepdb=True)
        yield
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        connection.close()


@pytest.fixture(scope="module", autouse=True)
def gpu_worker(database: None) -> Iterator[Worker]:
    """A live worker that has the base model; with the module its rows end."""
    decorators._num_failures += 1  # tests before these may have ended the connections of the API's threads
    yield rows.make_worker()
    call_command("flush", interactive=False, verbosity=0)


@pytest.fixture(autouse=True)
def _worker_is_alive(gpu_worker: Worker) -> None:
    assert workers.renew(gpu_worker, busy_share=0.0)
    assert base_models.get(rows.BASE_MODEL).is_loaded


@pytest.fixture
def alice() -> Actor:
    """A user with a key."""
    return Actor.make("alice")


@pytest.fixture
def bob() -> Actor:
    """Another user with a key."""
    return Actor.make("bob")


@pytest.fixture
def session(alice: Actor) -> Session:
    """An SDK session of alice's."""
    return alice.new_session()


@pytest.fixture
def run(alice: Actor) -> TrainingRun:
    """A run of alice's whose creation waits."""
    return rows.make_run(alice.user)


@pytest.fixture
def checkpoint(run: TrainingRun) -> Checkpoint:
    """A checkpoint of the run."""
    return rows.make_checkpoint(run)


@pytest.fixture
def sampling_session(alice: Actor) -> SamplingSession:
    """A sampling session of alice's on the base model."""
    return rows.make_sampling_session(alice.user)


@pytest.fixture
def worker() -> HandWorker:
    """Another worker, to answer operations with."""
    return HandWorker()


@pytest.fixture
def data() -> bytes:
    """A file that no other test has."""
    return rows_of(secrets.token_hex(8))


@pytest.fixture
def tus(alice: Actor) -> Tus:
    """Alice's client with her key."""
    return Tus({"x-api-key": alice.key})


@pytest.fixture
def browser(alice: Actor) -> Tus:
    """Alice's browser on a page of ours."""
    client = Client()
    client.force_login(alice.user)
    client.get("/login/")
    token = "t" * 32
    cookies = f"mintweb_session={client.cookies['mintweb_session'].value}; csrftoken={token}"
    return Tus({"cookie": cookies, "x-csrftoken": token}, base=PAGES)
