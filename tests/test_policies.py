"""Every route declares who may use it, and keeps to it: nothing is open by oversight.

Walks the tables of routes, so a new route is tested, or fails here, without anyone thinking of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import httpx
import pytest
from asgiref.testing import ApplicationCommunicator
from channels.routing import URLRouter
from django.contrib.auth.models import AnonymousUser
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from mintweb import asgi
from runs import urls
from runs.api.decorators import Endpoint
from runs.consumers import NOT_SIGNED_IN
from runs.models import User
from runs.services import keys, workers

PUBLIC_PAGES = {"health", "health-ready", "login", "login-link", "logout", "rest-schema", "rest-docs"}
OPEN_ENDPOINTS = {"client/config", "client/dynamic_config", "healthz", "telemetry", "archives/<str:token>"}
application: Any = asgi.application
POLICIES = {"public", "owner", "key", "operator", "operator key"}
OPERATORS_PAGES = {"worker-drain", "worker-resume", "drain_worker", "resume_worker"}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def page_routes(patterns: list[Any] | None = None, prefix: str = "") -> Iterator[tuple[str, URLPattern]]:
    """Yield the address and pattern of all of Django's routes."""
    for pattern in get_resolver().url_patterns if patterns is None else patterns:
        address = prefix + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from page_routes(pattern.url_patterns, address)
        else:
            yield address, pattern


def filled(route: str) -> str:
    """Return an address of the route whose ids name nothing."""
    return re.sub(r"<(?:(\w+):)?\w+>", lambda match: "1" if match[1] == "int" else "nothing", route)


def policy_of(pattern: URLPattern) -> str:
    return str(getattr(pattern.callback, "policy", "none declared"))


PAGES = list(page_routes())
ENDPOINTS = [(str(route.pattern), cast(Endpoint, route.callback)) for route in urls.sdk_routes]
SOCKETS = [(str(route.pattern), cast(Any, route.callback).consumer_class) for route in urls.socket_routes]


def test_there_are_routes_of_every_sort() -> None:
    assert len(PAGES) > 10
    assert len(ENDPOINTS) > 30
    assert len(SOCKETS) >= 2


@pytest.mark.parametrize(("address", "pattern"), PAGES, ids=[address or "/" for address, _ in PAGES])
def test_every_page_declares_its_policy(address: str, pattern: URLPattern) -> None:
    assert policy_of(pattern) in POLICIES
    assert policy_of(pattern).endswith("key") == (
        address.startswith("rest/v1/") and pattern.name not in PUBLIC_PAGES
    )
    assert policy_of(pattern).startswith("operator") == (pattern.name in OPERATORS_PAGES)
    assert (policy_of(pattern) == "public") == (pattern.name in PUBLIC_PAGES)


@pytest.mark.parametrize(
    ("address", "app"), ENDPOINTS, ids=[address or "the rest" for address, _ in ENDPOINTS]
)
def test_every_endpoint_declares_its_policy(address: str, app: Endpoint) -> None:
    assert isinstance(app, Endpoint)
    assert app.needs_key is (address not in OPEN_ENDPOINTS)


@pytest.mark.parametrize(("address", "consumer"), SOCKETS, ids=[address for address, _ in SOCKETS])
def test_every_socket_declares_its_policy(address: str, consumer: Any) -> None:
    assert consumer.policy == "owner"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.django_db
def test_a_stranger_is_sent_to_the_login_by_every_page_that_is_not_public(method: str) -> None:
    stranger = Client(raise_request_exception=False)
    for address, pattern in PAGES:
        if policy_of(pattern) not in ("owner", "operator"):
            continue
        reply = stranger.generic(method, "/" + filled(address))
        assert reply.status_code in (302, 403), address
        if reply.status_code == 302:
            assert reply.headers["location"].startswith("/login/?next="), address


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.django_db
def test_a_stranger_gets_401_from_every_address_that_needs_a_key(method: str) -> None:
    stranger = Client(raise_request_exception=False, headers={"cookie": "mintweb_session=x; csrftoken=y"})
    addresses = [address for address, pattern in PAGES if policy_of(pattern).endswith("key")]
    assert len(addresses) > 30
    for address in addresses:
        reply = stranger.generic(method, "/" + filled(address))
        assert reply.status_code in (401, 404, 405), address
        assert reply.status_code != 404 or address == "rest/v1/", address


@pytest.mark.parametrize("pk", [1, 2**31])
@pytest.mark.django_db
def test_who_is_no_operator_gets_403_whether_there_is_such_a_row_or_not(pk: int) -> None:
    person = User.objects.create(username="person")
    _, key = keys.create_key(person, "test")
    worker = workers.register(device="cpu", dtype="float32")
    browser = Client(raise_request_exception=False)
    browser.force_login(person)
    closed = [(address, policy_of(pattern)) for address, pattern in PAGES]
    closed = [(address, policy) for address, policy in closed if policy.startswith("operator")]
    assert len(closed) == len(OPERATORS_PAGES)
    for address, policy in closed:
        script = Client(headers={"x-api-key": key}, raise_request_exception=False)
        reply = (browser if policy == "operator" else script).post(
            "/" + filled(address).replace("/1/", f"/{worker.pk if pk == 1 else pk}/")
        )
        assert reply.status_code == 403, address
    worker.refresh_from_db()
    assert worker.drain_asked_at is None


@pytest.mark.django_db
def test_a_stranger_sees_public_pages() -> None:
    stranger = Client()
    for address, pattern in PAGES:
        if policy_of(pattern) == "public":
            method = "POST" if pattern.name == "logout" else "GET"
            assert stranger.generic(method, "/" + filled(address)).status_code in (200, 302, 503), address


@pytest.mark.django_db
def test_no_page_takes_a_post_without_its_token() -> None:
    stranger = Client(enforce_csrf_checks=True, raise_request_exception=False)
    for address, pattern in PAGES:
        if pattern.name not in ("health", "health-ready") and not address.startswith("rest/v1/"):
            reply = stranger.post("/" + filled(address))
            assert reply.status_code in (302, 403), address
            assert reply.status_code == 403 or policy_of(pattern) in ("owner", "operator"), address


async def test_a_stranger_gets_401_from_every_endpoint_that_needs_a_key() -> None:
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", trust_env=False
    ) as stranger:
        for address, app in ENDPOINTS:
            for method in app.views:
                reply = await stranger.request(method, "/api/v1/" + filled(address), content=b"{}")
                if app.needs_key:
                    assert reply.status_code == 401, (method, address)
                else:
                    assert reply.status_code in (200, 404), (method, address)


async def test_a_cookie_opens_no_endpoint() -> None:
    transport = httpx.ASGITransport(application)
    cookies = {"mintweb_session": "x" * 32, "csrftoken": "y" * 32}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", trust_env=False, cookies=cookies
    ) as browser:
        assert (await browser.get("/api/v1/training_runs")).status_code == 401


async def test_no_socket_has_a_word_for_a_stranger() -> None:
    """It is taken in and closed at once: only then the page hears the code that says why."""
    router: Any = URLRouter(cast(Any, urls.socket_routes))
    for address, _ in SOCKETS:

        async def as_stranger(scope: Any, receive: Any, send: Any) -> None:
            await router({**scope, "user": AnonymousUser()}, receive, send)

        said = await heard(as_stranger, filled(address))
        assert [one["type"] for one in said] == ["websocket.accept", "websocket.close"], address
        assert said[1]["code"] == NOT_SIGNED_IN, address


@pytest.mark.parametrize("origin", [None, b"null", b"http://evil.example", b"http://localhost.evil.example"])
async def test_no_socket_opens_from_another_site(origin: bytes | None) -> None:
    headers = [] if origin is None else [(b"origin", origin)]
    for address, _ in SOCKETS:
        assert not await is_opened(application, filled(address), headers), address


async def is_opened(app: Any, address: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> bool:
    """Ask for a socket and say whether it was accepted."""
    said = await heard(app, address, headers)
    return bool(said[0]["type"] == "websocket.accept")


async def heard(app: Any, address: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> list[dict[str, Any]]:
    """Ask for a socket, greet as a page does, and return all that the server sends."""
    scope = {
        "type": "websocket",
        "path": f"/{address}",
        "query_string": b"",
        "headers": list(headers),
        "subprotocols": [],
    }
    communicator: Any = ApplicationCommunicator(app, scope)  # type: ignore[no-untyped-call]
    await communicator.send_input({"type": "websocket.connect"})
    said = [await communicator.receive_output(timeout=5)]
    if said[0]["type"] == "websocket.accept":
        await communicator.send_input({"type": "websocket.receive", "text": '{"rows": [], "after": -1}'})
        while said[-1]["type"] != "websocket.close":
            said.append(await communicator.receive_output(timeout=5))
    await communicator.send_input({"type": "websocket.disconnect", "code": 1001})
    await communicator.wait()
    while not communicator.output_queue.empty():
        said.append(communicator.output_queue.get_nowait())
    return said
