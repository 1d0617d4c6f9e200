"""Who gets an answer: keys, tokens, and other people's objects, on every endpoint there is."""

from __future__ import annotations

import re
import time

import httpx
import jwt
import pytest
from django.db import connection
from django.db.models import Model

from runs.api.decorators import in_thread
from runs.models import (
    ApiKey,
    Checkpoint,
    Metric,
    Operation,
    SamplingSession,
    Session,
    TrainingRun,
    User,
)
from runs.services import keys
from tests.api import catalog
from tests.api.catalog import Owned, calls, endpoints, nobodys
from tests.api.client import BASE, Actor, error_of, http, send

TABLES: list[type[Model]] = [
    ApiKey,
    Checkpoint,
    Metric,
    Operation,
    SamplingSession,
    Session,
    TrainingRun,
    User,
]
OPEN = {"client/config", "client/dynamic_config", "telemetry", "healthz", "archives/<str:token>"}
SIGNED = "archives/1:unsigned:token"


@pytest.fixture
def owned(run: TrainingRun, checkpoint: Checkpoint, sampling_session: SamplingSession) -> Owned:
    """What alice has."""
    return catalog.owned_by(run, checkpoint, sampling_session)


def everything() -> str:
    """Return all rows that an endpoint could change, but for when a key was last used."""
    found = []
    for table in TABLES:
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT (to_jsonb(t) - 'last_used_at')::text FROM {table._meta.db_table} t ORDER BY 1"
            )
            found += [row[0] for row in cursor.fetchall()]
    return "\n".join(found)


def test_the_catalog_has_every_endpoint() -> None:
    called = {(call.method, call.path) for call in calls(nobodys())}
    missing = [
        (method, route)
        for method, route, _ in endpoints()
        if route and not any(method == m and re.fullmatch(_pattern(route), path) for m, path in called)
    ]
    assert missing == []


def _pattern(route: str) -> str:
    return re.sub(r"<str:\w+>", "[^/]+", route)


def test_only_these_endpoints_need_no_key() -> None:
    assert {route for _, route, app in endpoints() if not app.needs_key} == OPEN


@pytest.mark.parametrize(
    "credential",
    [
        "",
        "nonsense",
        "tml-" + "0" * 49,
        "sk-mint-wrong",
        "eyJhbGciOiJub25lIn0.eyJrZXkiOiJ4In0.",
        "eyJ\xff",
        "Bearer",
    ],
)
async def test_without_a_right_key_every_endpoint_says_401_and_does_nothing(
    owned: Owned, credential: str
) -> None:
    before = await in_thread(everything)
    for call in calls(owned):
        headers = {b"x-api-key": credential.encode("latin-1")} if credential else {}
        reply = await _bare(call.method, call.path, headers)
        if call.path in OPEN:
            assert reply.status_code == 200, call
        elif call.path == SIGNED:
            error_of(reply, 404)
        else:
            error_of(reply, 401)
            assert 'error="invalid_token"' in reply.headers["www-authenticate"]
    assert await in_thread(everything) == before


async def _bare(method: str, path: str, headers: dict[bytes, bytes]) -> httpx.Response:
    async with http() as client:
        return await client.request(method, BASE + path, headers=headers, content=b"{}")


async def test_of_another_users_objects_nothing_is_told_and_nothing_is_changed(
    owned: Owned, bob: Actor
) -> None:
    before = await in_thread(everything)
    missing = nobodys()
    for foreign, absent in zip(calls(owned), calls(missing), strict=True):
        if not foreign.names:
            continue
        told = await bob.request(foreign.method, foreign.path, foreign.body)
        expected = await bob.request(absent.method, absent.path, absent.body)
        assert expected.status_code == told.status_code == 404, foreign
        assert _without_ids(told.text, owned) == _without_ids(expected.text, missing), foreign
        assert dict(told.headers).keys() == dict(expected.headers).keys()
    assert await in_thread(everything) == before


def _without_ids(text: str, owned: Owned) -> str:
    for identifier in owned.ids:
        text = text.replace(identifier, "<id>")
    return text


async def test_the_owner_is_answered_everywhere(owned: Owned, alice: Actor) -> None:
    for call in calls(owned):
        if call.path in ("retrieve_future", SIGNED):
            continue  # the one waits (see test_futures), the other is nobody's
        reply = await alice.request(call.method, call.path, call.body)
        assert reply.status_code in (200, 204, 302), (call, reply.text)


@pytest.mark.parametrize(
    "request_id",
    [
        "op-0",
        "op-01",
        "op-",
        "op--1",
        "op-1.0",
        "1",
        "op-9999999999999999999",
        "op-\u0661",
        "OP-1",
        "op-1\n",
        "op-1 ",
    ],
)
async def test_a_malformed_request_id_is_like_a_missing_one(alice: Actor, request_id: str) -> None:
    reply = await alice.poll(request_id)
    assert reply.status_code in (404, 422)  # 422: it holds characters that no id may hold
    assert error_of(reply, reply.status_code)["code"] in ("not_found", "invalid_request")


@pytest.mark.parametrize(
    "path",
    [
        "training_runs/%00",
        "sessions/a%00b",
        "samplers/%00",
        "training_runs/a/checkpoints/weights/%00/publish",
    ],
)
async def test_a_nul_in_an_address_names_nothing(alice: Actor, path: str) -> None:
    for method in ("GET", "POST"):
        reply = await alice.request(method, path)
        assert reply.status_code in (404, 405), reply.text


async def test_a_key_works_in_both_spellings_and_as_bearer(alice: Actor) -> None:
    for spelling in keys.spellings(alice.key).values():
        as_key = await send("GET", BASE + "auth/apikey/me", x_api_key=spelling)
        as_bearer = await send("GET", BASE + "auth/apikey/me", authorization=f"Bearer {spelling}")
        assert as_key.status_code == as_bearer.status_code == 200


@pytest.mark.parametrize("spelling", ["tinker", "mint"])
async def test_a_key_is_exchanged_for_a_token_that_opens_the_same(
    alice: Actor, run: TrainingRun, spelling: str
) -> None:
    key = keys.spellings(alice.key)[spelling]
    reply = await send("POST", BASE + "auth/token", {}, x_api_key=key)
    token = reply.json()["jwt"]
    assert token.startswith("eyJ")
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["exp"] - time.time() > 1800
    assert claims["iat"] <= time.time()
    with_token = Actor(alice.user, token)
    assert (await with_token.get(f"training_runs/{run.public_id}")).status_code == 200
    assert (await with_token.post("auth/token")).json() == {"jwt": token}


async def test_a_revoked_key_is_dead_with_its_tokens(alice: Actor) -> None:
    token = (await alice.post("auth/token")).json()["jwt"]
    row = await ApiKey.objects.aget(owner=alice.user)
    await in_thread(lambda: keys.revoke_key(alice.user, row.pk))
    for credential in (alice.key, keys.spellings(alice.key)["mint"], token):
        error_of(await Actor(alice.user, credential).get("auth/apikey/me"), 401)


async def test_the_use_of_a_key_is_noted(alice: Actor) -> None:
    await alice.get("auth/apikey/me")
    assert (await ApiKey.objects.aget(owner=alice.user)).last_used_at is not None
