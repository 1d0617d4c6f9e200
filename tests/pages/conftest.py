"""Two people, one of them signed in, and a base model with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.core.cache import cache
from django.test import Client
from playwright.sync_api import expect
from tokenizers import Tokenizer

from runs.models import TrainingRun, User
from tests.pages import seed

PASSWORD = "correct horse battery"

# Five seconds are not enough for a busy machine; a deadline costs nothing where all is well.
expect.set_options(timeout=60_000)


@pytest.fixture(autouse=True)
def _fresh_cache() -> None:
    cache.clear()


@pytest.fixture
def alice(db: None) -> User:
    """Return the person who is signed in."""
    return seed.make_user("alice", PASSWORD)


@pytest.fixture
def bob(db: None) -> User:
    """Return somebody else."""
    return seed.make_user("bob", PASSWORD)


@pytest.fixture
def page(client: Client, alice: User) -> Client:
    """Return alice's browser."""
    client.force_login(alice)
    return client


@pytest.fixture
def tokenizer(db: None, tmp_path: Path) -> Tokenizer:
    """Enter a loaded base model and return its tokenizer."""
    return seed.make_base_model(tmp_path / "tokenizer")


@pytest.fixture
def run(alice: User) -> TrainingRun:
    """Return alice's run with a few steps."""
    run = seed.make_run(alice, name="alice's run")
    seed.add_values(run, seed.curve(30))
    seed.add_operations(run)
    return run
