"""Fixtures of the service tests: two users, a run of the first, and workers by hand."""

from __future__ import annotations

import pytest
from django.db.models.functions import Now

from runs.models import TrainingRun, User, Worker
from tests.services import rows
from tests.services.hand_worker import HandWorker


@pytest.fixture(autouse=True)
def no_other_worker(db: None) -> None:
    """End the workers that tests with real commits have left behind."""
    Worker.objects.filter(stopped_at=None).update(stopped_at=Now())


@pytest.fixture
def alice(db: None) -> User:
    """Return a user."""
    return rows.make_user("alice")


@pytest.fixture
def bob(db: None) -> User:
    """Return another user."""
    return rows.make_user("bob")


@pytest.fixture
def worker(db: None) -> HandWorker:
    """Return a live worker that has the base model."""
    worker = HandWorker()
    rows.report_base_model(worker.row)
    return worker


@pytest.fixture
def run(alice: User, worker: HandWorker) -> TrainingRun:
    """Return a run of alice's whose creation waits."""
    return rows.make_run(alice)
