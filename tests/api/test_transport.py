"""Bodies on their way in: limits, encodings, clients that leave."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import pytest
import zstandard
from pytest_django.fixtures import Settings

from runs.api import request_bodies
from runs.models import TrainingRun
from tests.api import bodies
from tests.api.client import Actor, RawRequest, Stopwatch, error_of, operation, operation_pk, seqs_of

LIMIT = 20_000


@pytest.fixture
def limit(settings: Settings) -> int:
    """Take bodies of 20,000 bytes at most."""
    settings.MAX_BODY_BYTES = LIMIT
    return LIMIT


def packed(body: dict[str, Any]) -> dict[str, bytes]:
    plain = json.dumps(body).encode()
    return {"gzip": gzip.compress(plain), "deflate": zlib.compress(plain), "zstd": zstandard.compress(plain)}


async def test_a_body_of_the_limit_is_taken_and_one_more_byte_is_not(
    alice: Actor, limit: int, run: TrainingRun
) -> None:
    plain = json.dumps(bodies.optim_step(run, 1)).encode()
    assert (await alice.post("optim_step", plain.ljust(limit))).status_code == 200
    error = error_of(await alice.post("optim_step", plain.ljust(limit + 1)), 413)
    assert error["detail"] == "the body has 20001 bytes; the most is 20000"


async def test_a_body_without_length_is_cut_off_at_the_limit(alice: Actor, limit: int) -> None:
    request = RawRequest("create_session", headers=[("x-api-key", alice.key)])

    async def endless() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    await request.run(endless)
    assert request.status == 413
    assert request.num_received == limit // 1000 + 1


@pytest.mark.parametrize("declared", ["10", "99999999999999999999", "-1", "\xb2", "abc", ""])
async def test_a_lying_content_length_changes_nothing(alice: Actor, limit: int, declared: str) -> None:
    headers = [("x-api-key", alice.key), ("content-length", declared)]
    request = RawRequest("create_session", headers=headers)
    parts = iter([b"{" + b" " * 1000, b"}"])

    async def receive() -> dict[str, Any]:
        body = next(parts)
        return {"type": "http.request", "body": body, "more_body": body != b"}"}

    await request.run(receive)
    assert request.status == 200


@pytest.mark.parametrize(("path", "at_most"), [("client/config", 64 << 10), ("telemetry", 1 << 20)])
async def test_little_is_read_of_who_has_no_key(path: str, at_most: int) -> None:
    async def endless() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 1024, "more_body": True}

    request = RawRequest(path)
    await request.run(endless)
    assert request.status == 413
    assert request.num_received == at_most // 1024 + 1


async def test_a_body_that_does_not_arrive_is_to_be_sent_again(
    alice: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_bodies, "_TIMEOUT_S", 0.05)
    request = RawRequest("optim_step", headers=[("x-api-key", alice.key)])
    await request.run(asyncio.Event().wait)
    assert (request.status, request.content["code"]) == (408, "body_too_slow")
    assert request.headers["retry-after"] == "1"


async def test_a_length_above_the_limit_is_refused_unread(alice: Actor, limit: int) -> None:
    request = RawRequest("create_session", headers=[("x-api-key", alice.key), ("content-length", "20001")])

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    await request.run(receive)
    assert request.status == 413


async def test_an_unknown_key_is_refused_with_the_body_unread() -> None:
    request = RawRequest("optim_step", headers=[("x-api-key", "tml-unknown")])

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    await request.run(receive)
    assert request.status == 401


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(alice: Actor, run: TrainingRun) -> None:
    request = RawRequest("optim_step", headers=[("x-api-key", alice.key)])
    body = json.dumps(bodies.optim_step(run, 1)).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    await request.run(receive)
    assert request.sent == []
    assert await seqs_of(run) == [(0, "create_model", "queued")]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
async def test_packed_bodies_are_the_same_request(alice: Actor, run: TrainingRun, encoding: str) -> None:
    body = bodies.optim_step(run, 1)
    plain = await alice.submit("optim_step", body)
    reply = await alice.post("optim_step", packed(body)[encoding], content_encoding=encoding)
    assert operation_pk(reply) == plain
    assert (await operation(plain)).payload


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
async def test_a_bomb_is_refused_before_it_unfolds(alice: Actor, encoding: str) -> None:
    bomb = {
        "gzip": gzip.compress(bytes(32 << 20), 9),
        "deflate": zlib.compress(bytes(32 << 20), 9),
        "zstd": zstandard.compress(bytes(32 << 20)),
    }[encoding]
    with Stopwatch() as watch:
        reply = await alice.post("optim_step", bomb, content_encoding=encoding)
    assert "unpacks to more than" in error_of(reply, 413)["detail"]
    assert watch.elapsed_s < 1


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "\x00"])
async def test_an_encoding_nobody_knows_is_415(alice: Actor, encoding: str) -> None:
    error_of(await alice.post("optim_step", b"{}", content_encoding=encoding), 415)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
async def test_damaged_packing_is_422(alice: Actor, run: TrainingRun, encoding: str) -> None:
    whole = packed(bodies.optim_step(run, 1))[encoding]
    for body in (whole[:-5], b"", b"plain", whole + b"rest"):
        error_of(await alice.post("optim_step", body, content_encoding=encoding), 422)


async def test_many_requests_at_once_are_all_answered(alice: Actor, run: TrainingRun) -> None:
    replies = await asyncio.gather(
        *(alice.post("optim_step", bodies.optim_step(run, seq)) for seq in range(1, 101))
    )
    assert {reply.status_code for reply in replies} == {200}
    assert len({operation_pk(reply) for reply in replies}) == 100
