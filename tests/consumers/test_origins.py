"""Only this site's pages open sockets: another program on the same host is another site."""

from __future__ import annotations

import pytest
from django.test import override_settings

from runs import events
from runs.models import User
from tests.consumers.conftest import Open
from tests.consumers.sockets import Socket, subscribed

pytestmark = pytest.mark.django_db(transaction=True)
PATH = "/ws/runs/"


async def is_heard(socket: Socket) -> bool:
    """Return whether the server took the socket, which then hears of alice's runs."""
    if socket.is_open:
        await subscribed(events.owner_group((await User.objects.aget(username="alice")).pk))
    return socket.is_open


@pytest.mark.parametrize(
    ("origin", "host", "scheme"),
    [
        ("http://localhost:8000", "localhost:8000", "ws"),
        ("http://LOCALHOST", "localhost:80", "ws"),
        ("http://[::1]:8000", "[::1]:8000", "ws"),
        ("https://localhost", "localhost", "wss"),
    ],
)
async def test_a_page_of_this_server_opens_a_socket(
    connect: Open, origin: str, host: str, scheme: str
) -> None:
    assert await is_heard(await connect(PATH, origin=origin, host=host, scheme=scheme))


@pytest.mark.parametrize(
    ("origin", "host", "scheme"),
    [
        ("http://localhost:8888", "localhost:8000", "ws"),
        ("http://localhost", "localhost:8000", "ws"),
        ("http://127.0.0.1:8000", "localhost:8000", "ws"),
        ("http://localhost", "localhost", "wss"),
        ("https://localhost:8000", "localhost:8000", "ws"),
        ("http://evil.example", "evil.example", "ws"),
        ("null", "localhost:8000", "ws"),
        ("", "localhost:8000", "ws"),
    ],
)
async def test_another_site_does_not(connect: Open, origin: str, host: str, scheme: str) -> None:
    assert not (await connect(PATH, origin=origin, host=host, scheme=scheme)).is_open


async def test_behind_a_proxy_the_public_address_is_this_site(connect: Open) -> None:
    with override_settings(PUBLIC_URL="https://localhost:8443"):
        assert await is_heard(await connect(PATH, origin="https://localhost:8443", host="127.0.0.1:8000"))
        assert not (await connect(PATH, origin="https://localhost:8444", host="127.0.0.1:8000")).is_open
        assert not (await connect(PATH, origin="http://localhost:8443", host="127.0.0.1:8000")).is_open
    assert not (await connect(PATH, origin="https://localhost:8443", host="127.0.0.1:8000")).is_open
