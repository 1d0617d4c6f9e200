"""Several web processes, none of which has a Redis: together they allow as many guesses as one."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from runs.models import User
from runs.services.lockout import MAX_TRIES
from tests.pages.live.server import Server

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.e2e]
PASSWORD = "a good long password"


@pytest.fixture
def servers(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")  # where nothing listens
    servers = [Server(fresh=True), Server(fresh=True)]
    for server in servers:
        server.start()
    yield servers
    for server in servers:
        server.kill()


def sign_in(server: Server, password: str) -> int:
    """Fill in the form as a browser does; returns the status of the answer."""
    with httpx.Client(base_url=server.address, trust_env=False, timeout=60) as browser:
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', browser.get("/login/").text)
        assert token is not None
        form = {"username": "alice", "password": password, "csrfmiddlewaretoken": token[1]}
        return browser.post("/login/", data=form).status_code


def test_two_processes_share_the_count_and_need_no_redis_for_it(
    servers: list[Server],
    alice: User,
) -> None:
    first, second = servers
    assert sign_in(first, PASSWORD) == 302
    tries = [sign_in(servers[number % 2], "wrong") for number in range(MAX_TRIES)]
    assert tries == [403] * MAX_TRIES
    assert [sign_in(server, "wrong") for server in servers] == [429, 429]
    assert sign_in(second, PASSWORD) == 429
    first.kill()
    first.start()  # a restart forgets nothing
    assert sign_in(first, PASSWORD) == 429
