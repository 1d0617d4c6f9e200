"""Fixtures shared by all tests; the databases are real (see `tests.databases`)."""

from __future__ import annotations

import pytest

from runs.models import User
from runs.services import accounts


@pytest.fixture
def admin(db: None) -> User:
    """Return the first user."""
    return accounts.ensure_admin()
