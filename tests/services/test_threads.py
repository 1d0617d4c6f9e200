"""Waiting for the database."""

from __future__ import annotations

import pytest
from django.db import InternalError, connection, transaction

from runs import threads
from runs.models import User
from tests.services import rows


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_RETRY_S", 0.0)


def test_a_database_that_takes_no_writes_for_now_is_waited_for(transactional_db: None) -> None:
    modes = iter(["READ ONLY", "READ ONLY", "READ WRITE"])

    def write() -> User:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(f"SET TRANSACTION {next(modes)}")
            return rows.make_user("alice")

    assert threads.until_reachable(write).pk
    assert next(modes, None) is None


def test_another_error_of_the_database_is_not_waited_for(transactional_db: None) -> None:
    def fail() -> None:
        with connection.cursor() as cursor:
            cursor.execute("DO $$ BEGIN RAISE EXCEPTION 'odd' USING ERRCODE = 'internal_error'; END $$")

    with pytest.raises(InternalError, match="odd"):
        threads.until_reachable(fail)
