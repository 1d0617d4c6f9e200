"""Operations whose body is refused unread or half read take up their seq_id too, where either end of it tells."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import zstandard
from pytest_django.fixtures import Settings

from runs.api import request_bodies
from runs.models import Operation, TrainingRun
from tests.api import bodies
from tests.api.client import Actor, RawRequest, Stopwatch, error_of
from tests.schemas.batches import good_datum, proto_body

LIMIT = 100_000
PROTO = "application/x-protobuf"


@pytest.fixture(autouse=True)
def _limit(settings: Settings) -> None:
    settings.MAX_BODY_BYTES = LIMIT


async def taken(run: TrainingRun) -> list[tuple[int, str, str, str]]:
    """Return seq, kind, state and error of what follows the run's creation."""
    rows = Operation.objects.filter(run=run, seq__gt=0).order_by("seq")
    return [row async for row in rows.values_list("seq", "kind", "state", "error")]


def json_of_old_client(run: TrainingRun, seq: int, num_bytes: int) -> bytes:
    """Return a forward_backward as 0.22 writes it: the ids behind the data."""
    body = bodies.forward_backward(run, seq)
    data = body["forward_backward_input"]["data"]
    body["forward_backward_input"]["data"] = data * (num_bytes // len(json.dumps(data)) + 1)
    content = json.dumps({name: body[name] for name in ("forward_backward_input", "model_id", "seq_id")})
    assert len(content) > num_bytes
    return content.encode()


def proto(run: TrainingRun, seq: int, num_bytes: int) -> bytes:
    """Return a forward_backward as protobuf, which has the ids in front."""
    num_datums = num_bytes // len(proto_body([good_datum()])) + 1
    content = proto_body([good_datum()] * (2 * num_datums), model_id=run.public_id, seq_id=seq)
    assert len(content) > num_bytes
    return content


async def in_parts(alice: Actor, path: str, parts: Iterable[bytes], **headers: str) -> RawRequest:
    """Send a body in parts, without its length unless that is among the headers."""
    sent = {"x-api-key": alice.key} | {name.replace("_", "-"): text for name, text in headers.items()}
    request = RawRequest(path, headers=list(sent.items()))
    rest = iter([*parts, None]) if isinstance(parts, list) else iter(parts)

    async def receive() -> dict[str, Any]:
        part = next(rest, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    await request.run(receive)
    return request


@pytest.mark.parametrize("path", ["forward_backward", "forward"])
async def test_a_body_that_is_too_large_takes_up_its_seq(alice: Actor, run: TrainingRun, path: str) -> None:
    reply = await alice.post(path, json_of_old_client(run, 1, LIMIT))
    detail = error_of(reply, 413)["detail"]
    assert await taken(run) == [(1, path, "failed", detail)]
    await alice.submit("optim_step", bodies.optim_step(run, 2))


async def test_a_message_that_is_too_large_takes_up_its_seq_and_is_not_read_to_its_end(
    alice: Actor, run: TrainingRun
) -> None:
    content = proto(run, 1, 3 * LIMIT)
    parts = [content[start : start + 10_000] for start in range(0, len(content), 10_000)]
    length = str(len(content))
    request = await in_parts(alice, "forward_backward", parts, content_type=PROTO, content_length=length)
    assert (request.status, request.content["detail"]) == (
        413,
        f"the body has {length} bytes; the most is {LIMIT}",
    )
    assert [row[:3] for row in await taken(run)] == [(1, "forward_backward", "failed")]
    assert request.num_received == request_bodies._END_BYTES // 10_000 + 1


async def test_a_body_of_no_known_length_takes_up_its_seq(alice: Actor, run: TrainingRun) -> None:
    content = json_of_old_client(run, 1, 3 * LIMIT)
    parts = [content[start : start + 10_000] for start in range(0, len(content), 10_000)]
    assert (await in_parts(alice, "forward_backward", parts)).status == 413
    message = proto(run, 2, 3 * LIMIT)
    parts = [message[start : start + 10_000] for start in range(0, len(message), 10_000)]
    assert (await in_parts(alice, "forward_backward", parts, content_type=PROTO)).status == 413
    assert [row[0] for row in await taken(run)] == [1, 2]


@pytest.mark.parametrize("num_bytes", [LIMIT, 2 << 20], ids=["too large", "too well packed"])
async def test_what_unpacks_to_too_much_takes_up_its_seq(
    alice: Actor, run: TrainingRun, settings: Settings, num_bytes: int
) -> None:
    settings.MAX_BODY_BYTES = LIMIT if num_bytes == LIMIT else 64 << 20
    packed = zstandard.compress(proto(run, 1, num_bytes))
    assert len(packed) < LIMIT
    reply = await alice.post("forward_backward", packed, content_type=PROTO, content_encoding="zstd")
    assert "unpacks to more than" in error_of(reply, 413)["detail"]
    assert [row[:3] for row in await taken(run)] == [(1, "forward_backward", "failed")]


async def test_a_packed_body_that_is_too_large_or_damaged_takes_up_its_seq(
    alice: Actor, run: TrainingRun, settings: Settings
) -> None:
    settings.MAX_BODY_BYTES = 1024
    packed = zstandard.compress(proto(run, 1, 1 << 20))
    await in_parts(alice, "forward_backward", [packed] * 20, content_type=PROTO, content_encoding="zstd")
    settings.MAX_BODY_BYTES = LIMIT
    cut_off = gzip.compress(json.dumps(bodies.optim_step(run, 2)).encode())[:-5]
    error_of(await alice.post("optim_step", cut_off, content_encoding="gzip"), 422)
    assert [row[:3] for row in await taken(run)] == [
        (1, "forward_backward", "failed"),
        (2, "optim_step", "failed"),
    ]


async def test_an_encoding_nobody_knows_takes_up_the_seq_of_a_body_that_is_plain(
    alice: Actor, run: TrainingRun
) -> None:
    for encoding in ("utf-8", "br"):
        body = json.dumps(bodies.optim_step(run, 1)).encode()
        error_of(await alice.post("optim_step", body, content_encoding=encoding), 415)
    error_of(await alice.post("optim_step", b"\x8b\x02\x80{}\x03", content_encoding="br"), 415)
    assert [row[:3] for row in await taken(run)] == [(1, "optim_step", "failed")]


async def test_a_body_far_too_large_is_refused_unread(alice: Actor) -> None:
    length = str(request_bodies._READ_ON * LIMIT + 1)
    request = await in_parts(alice, "forward_backward", [b"{"], content_length=length)
    assert (request.status, request.num_received) == (413, 0)


async def test_a_body_without_end_is_not_kept_and_not_read_for_ever(alice: Actor) -> None:
    def parts() -> Iterator[bytes]:
        while True:
            yield b"x" * 10_000

    request = await in_parts(alice, "optim_step", parts())
    assert request.status == 413
    assert request.num_received == request_bodies._READ_ON * LIMIT // 10_000


async def test_a_body_too_large_that_does_not_go_on_is_refused_for_good(
    alice: Actor, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_bodies, "_TIMEOUT_S", 0.1)
    request = RawRequest("optim_step", headers=[("x-api-key", alice.key)])
    start = json.dumps(bodies.optim_step(run, 1)).encode()[:-1].ljust(LIMIT + 1)
    messages = iter([{"type": "http.request", "body": start, "more_body": True}])

    async def receive() -> Any:
        return next(messages, None) or await asyncio.Event().wait()

    with Stopwatch() as watch:
        await request.run(receive)
    assert request.status == 413  # and not 408, after which it would come again
    assert watch.elapsed_s < 5
    assert [row[0] for row in await taken(run)] == [1]


async def test_ids_that_are_not_clear_or_somebody_elses_take_up_nothing(
    alice: Actor, bob: Actor, run: TrainingRun
) -> None:
    content = json_of_old_client(run, 1, LIMIT)
    error_of(await bob.post("forward_backward", content), 413)
    error_of(await alice.post("forward_backward", content[:-1] + b', "seq_id": 2}'), 413)
    error_of(await alice.post("forward_backward", content.replace(b'"seq_id": 1', b'"seq_id": 1.5')), 413)
    error_of(await alice.post("forward_backward", content, content_type=PROTO), 413)
    error_of(await alice.post("forward_backward", proto(run, 1, LIMIT)), 413)
    assert await taken(run) == []
