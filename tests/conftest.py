"""Fixtures shared by all tests; the databases are real (see `tests.databases`)."""

from __future__ import annotations

from typing import Any

import pytest

from runs.models import User
from runs.services import accounts, base_models, workers


@pytest.fixture
def admin(db: None) -> User:
    """Return the first user."""
    return accounts.ensure_admin()


@pytest.fixture(autouse=True)
def _base_models_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test see the base models of its own settings, not those that a test before it has seen."""
    monkeypatch.setattr(base_models, "_cache", None)


@pytest.fixture(autouse=True)
def _the_database_is_there_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers be found dead at once: some tests close all of the few sessions there are."""
    monkeypatch.setattr(workers, "RETURN_GRACE_S", 0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show why each test that was tried again had failed, though it may have passed then."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.write_sep("-", f"first try of {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)
