"""The socket that talks to weights: text while it is drawn, the row's answer last, sentences for what goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from django.db import transaction
from django.test import override_settings

from runs import events
from runs.models import Operation, Session, TrainingRun, User, Worker
from runs.playground_consumer import PlaygroundConsumer
from runs.recipes import rendering
from runs.recipes.rendering import Renderer
from runs.schemas import requests, results
from runs.schemas.sampling import StoredSample
from runs.services import commits, operations
from runs.services.commits import Result
from tests.consumers.conftest import Open, make_worker
from tests.consumers.sockets import PATIENCE_S, Socket, subscribed
from tests.pages import seed
from tests.services import rows

pytestmark = pytest.mark.django_db(transaction=True)
PATH = "/ws/playground/"
BASE = {"base_model": rows.BASE_MODEL}
HOSTILE = "<img src=x onerror=alert(1)></script>"
WORDS = "Ahoy \U0001f3f4\u200d\u2620\ufe0f caf\u00e9!"


@pytest.fixture
async def renderer(cookie: str) -> Renderer:
    """Return how the shipped model writes."""
    return await sync_to_async(rendering.renderer_of)(rows.BASE_MODEL)


@pytest.fixture
async def worker(cookie: str) -> Worker:
    """Return a live worker that draws nothing by itself."""
    return await sync_to_async(make_worker)()


async def hear(socket: Socket, *wanted: str) -> dict[str, Any]:
    """Return the next message that has one of the keys."""
    while True:
        message = await socket.hear()
        if any(name in message for name in wanted):
            return message


async def asked(*, number: int = 1) -> list[Operation]:
    """Return the samples that were asked for, once there are so many."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = [row async for row in Operation.objects.filter(kind="sample").order_by("pk")]
            if len(found) >= number:
                return found
            await asyncio.sleep(0.01)


async def show(row: Operation, start: int, tokens: Sequence[int], *, is_last: bool = False) -> None:
    layer: Any = get_channel_layer()
    assert row.sampling_session_id is not None
    group = events.sampling_group(row.sampling_session_id)
    await subscribed(group)
    await layer.group_send(
        group,
        events.SamplePartial(
            type="sample.partial", operation=row.pk, start=start, tokens=list(tokens), is_last=is_last
        ),
    )


async def answer(row: Operation, tokens: Sequence[int], stop_reason: results.StopReason = "stop") -> None:
    sequence = results.SampledSequence(
        tokens=np.array(tokens, dtype=np.int64),
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        stop_reason=stop_reason,
    )
    body = results.encode_sample(results.SampleOutput(sequences=(sequence,)))
    await sync_to_async(commits.commit_samples)({row.pk: Result(body=body, is_proto=True)})
    await show(row, 0, [], is_last=True)


def question(ask: str = "a", **more: Any) -> dict[str, Any]:
    return {"ask": ask, "messages": [{"role": "user", "content": "Hello"}], "targets": [BASE], **more}


async def test_text_comes_while_it_is_drawn_and_the_result_stands(
    connect: Open, renderer: Renderer, worker: Worker
) -> None:
    socket = await connect(PATH)
    await socket.say_json(question(max_tokens=50, temperature=0.25, seed=7))
    started = await hear(socket, "made_by")
    assert started == {"ask": "a", "target": 0, "made_by": rows.BASE_MODEL, "step": None, "seed": 7}
    (row,) = await asked()
    body = requests.from_canonical(StoredSample, operations.payload_of(row.payload, row.payload_file))
    assert body.stream
    assert (body.sampling_params.max_tokens, body.sampling_params.seed) == (50, 7)
    assert body.sampling_params.temperature == 0.25
    assert body.prompt.array(place="prompt").tolist() == renderer.prompt(
        [{"role": "user", "content": "Hello"}]
    )
    tokens = renderer.prompt("Ahoy there, matey", as_chat=False)
    await show(row, 0, tokens[:2])
    assert (await hear(socket, "more"))["more"] == renderer.decode(tokens[:2])
    await show(row, 2, tokens[2:])
    assert (await hear(socket, "more"))["more"] == renderer.decode(tokens)[len(renderer.decode(tokens[:2])) :]
    await answer(row, [*tokens, renderer.stop_tokens[0]])
    last = await hear(socket, "done")
    assert (last["text"], last["stop_reason"]) == (renderer.decode(tokens), "stop")
    assert last["num_tokens"] == len(tokens) + 1


async def test_characters_of_many_bytes_are_never_shown_in_halves(
    connect: Open, renderer: Renderer, worker: Worker
) -> None:
    socket = await connect(PATH)
    await socket.say_json(question())
    (row,) = await asked()
    tokens = renderer.prompt(WORDS, as_chat=False)
    shown = ""
    for start in range(len(tokens)):
        await show(row, start, tokens[start : start + 1])
        message = await hear(socket, "more", "text")
        shown = message["text"] if "text" in message else shown + message["more"]
        assert "\ufffd" not in shown
        assert WORDS.startswith(shown)
    assert shown == WORDS


async def test_a_lost_piece_is_made_good_by_the_result(
    connect: Open, renderer: Renderer, worker: Worker
) -> None:
    socket = await connect(PATH)
    await socket.say_json(question())
    (row,) = await asked()
    tokens = renderer.prompt("one two three four", as_chat=False)
    await show(row, 0, tokens[:1])
    await show(row, 2, tokens[2:])
    await answer(row, tokens, "length")
    last = await hear(socket, "done")
    assert (last["text"], last["stop_reason"]) == (renderer.decode(tokens), "length")


async def test_without_redis_the_answer_still_comes(
    connect: Open, renderer: Renderer, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlaygroundConsumer, "look_s", 0.1)
    nowhere = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": ["redis://127.0.0.1:1/0"]},
        }
    }
    with override_settings(CHANNEL_LAYERS=nowhere):
        socket = await connect(PATH)
        await socket.say_json(question())
        (row,) = await asked()
        tokens = renderer.prompt("still here", as_chat=False)
        sequence = results.SampledSequence(
            tokens=np.array(tokens), logprobs=np.zeros(len(tokens), np.float32), stop_reason="stop"
        )
        body = results.encode_sample(results.SampleOutput(sequences=(sequence,)))
        await sync_to_async(commits.commit_samples)({row.pk: Result(body=body, is_proto=True)})
        assert (await hear(socket, "done"))["text"] == "still here"


async def test_base_and_tuned_answer_side_by_side(
    connect: Open, renderer: Renderer, run: TrainingRun, worker: Worker
) -> None:
    older = await sync_to_async(seed.add_checkpoint)(run, "step-000002", step=2)
    await TrainingRun.objects.filter(pk=run.pk).aupdate(applied_seq=12)
    await run.arefresh_from_db()
    newest = await sync_to_async(seed.add_checkpoint)(run, "step-000005", step=5)
    socket = await connect(PATH)
    path = f"tinker://{run.public_id}/weights/step-000002"
    targets = [BASE, {"checkpoint": path}, {"run": run.public_id}]
    await socket.say_json(question(targets=targets, messages=None, prompt="Once upon"))
    names = [((await hear(socket, "made_by"))["made_by"]) for _ in targets]
    assert names == [rows.BASE_MODEL, "step-000002", "step-000005"]
    found = await asked(number=3)
    sessions = [
        await Operation.objects.values_list("sampling_session__checkpoint", flat=True).aget(pk=row.pk)
        for row in found
    ]
    assert sessions == [None, older.pk, newest.pk]
    for number, row in enumerate(found):
        await answer(row, renderer.prompt(f"answer {number}", as_chat=False))
    texts = {(last := await hear(socket, "done"))["target"]: last["text"] for _ in targets}
    assert texts == {0: "answer 0", 1: "answer 1", 2: "answer 2"}


async def test_a_run_without_weights_says_so(connect: Open, run: TrainingRun, renderer: Renderer) -> None:
    socket = await connect(PATH)
    await socket.say_json(question(targets=[{"run": run.public_id}]))
    message = await hear(socket, "error")
    assert message["place"] == "run"
    assert "no checkpoint yet" in message["error"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"targets": []}, "targets"),
        ({"targets": [{"base_model": "x", "run": "y"}]}, "one of base_model, checkpoint, run"),
        ({"targets": [{"base_model": "no/such"}]}, "unknown base model 'no/such'"),
        ({"targets": [{"checkpoint": "tinker://a/weights/b"}]}, "there is no checkpoint"),
        ({"targets": [{"run": "nobody's"}]}, "there is no training run"),
        ({"messages": None}, "give messages or prompt"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"seed": 2**70}, "seed"),
    ],
)
async def test_what_cannot_be_answers_in_words(
    connect: Open, renderer: Renderer, more: dict[str, Any], words: str
) -> None:
    socket = await connect(PATH)
    await socket.say_json(question(**more))
    message = await hear(socket, "error")
    assert message["ask"] == "a"
    assert words in message["error"]
    await socket.say_json({})
    assert await hear(socket, "ready")


async def test_somebody_elses_weights_look_missing(
    connect: Open, run: TrainingRun, renderer: Renderer
) -> None:
    bob = await sync_to_async(seed.make_user)("bob")
    await sync_to_async(seed.add_checkpoint)(run, "secret")
    await TrainingRun.objects.filter(pk=run.pk).aupdate(owner=bob)
    await run.checkpoints.aupdate(owner=bob)
    socket = await connect(PATH)
    path = f"tinker://{run.public_id}/weights/secret"
    for target in ({"checkpoint": path}, {"run": run.public_id}):
        await socket.say_json(question(targets=[target]))
        assert "there is no" in (await hear(socket, "error"))["error"]
    assert not await Operation.objects.filter(kind="sample").aexists()


async def test_stopping_ends_the_sample(connect: Open, renderer: Renderer, worker: Worker) -> None:
    socket = await connect(PATH)
    await socket.say_json(question())
    (row,) = await asked()
    await socket.say_json({"stop": "a"})
    assert (await hear(socket, "error"))["error"] == "stopped"
    await row.arefresh_from_db()
    assert row.state == Operation.State.FAILED


async def test_a_closed_page_stops_what_nobody_reads(
    connect: Open, renderer: Renderer, worker: Worker
) -> None:
    socket = await connect(PATH)
    await socket.say_json(question())
    (row,) = await asked()
    await hear(socket, "made_by")
    await socket.say_json({})
    await hear(socket, "ready")
    await socket.leave()
    await row.arefresh_from_db()
    assert (row.state, row.error) == (Operation.State.FAILED, "stopped")
    assert (await Session.objects.filter(tags=["playground"]).aget()).finished_at is not None


async def test_waiting_is_explained(
    connect: Open, run: TrainingRun, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlaygroundConsumer, "look_s", 0.1)
    monkeypatch.setattr("runs.playground_consumer.WAITING_AFTER_S", 0.2)
    socket = await connect(PATH)
    await socket.say_json(question())
    assert "no GPU worker is running" in (await hear(socket, "waiting"))["waiting"]

    @transaction.atomic  # or the socket may tell what is true in between
    def have_a_busy_worker() -> None:
        worker = make_worker()
        seed.add_operations(run)
        TrainingRun.objects.filter(pk=run.pk).update(worker=worker)

    await sync_to_async(have_a_busy_worker)()
    message = await hear(socket, "waiting")
    assert message["waiting"] == "waiting: the worker is busy with run live one"
    await socket.say_json(question("b"))
    while (message := await hear(socket, "waiting"))["ask"] != "b":
        pass
    assert message["waiting"] == "waiting: 1 sample is before this one"


async def test_a_page_whose_answer_waits_hears_that_the_socket_lives(
    connect: Open, renderer: Renderer, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it takes it for dead and asks anew, behind everybody."""
    monkeypatch.setattr(PlaygroundConsumer, "look_s", 0.1)
    monkeypatch.setattr(PlaygroundConsumer, "longest_silence_s", 0.3)
    socket = await connect(PATH)
    await socket.say_json(question())
    await asked()
    for _ in range(3):
        assert (await hear(socket, "ready"))["ready"] is True


async def test_too_many_at_once_are_refused(connect: Open, renderer: Renderer, worker: Worker) -> None:
    socket = await connect(PATH)
    for number in range(5):
        await socket.say_json(question(f"ask {number}", targets=[BASE] * 4))
    message = await hear(socket, "error")
    assert message["ask"] == "ask 4"
    assert "16 answers are on their way" in message["error"]


async def test_hostile_text_passes_as_text(connect: Open, renderer: Renderer, worker: Worker) -> None:
    socket = await connect(PATH)
    await socket.say_json(question())
    (row,) = await asked()
    await answer(row, renderer.prompt(HOSTILE, as_chat=False))
    assert (await hear(socket, "done"))["text"] == HOSTILE


async def test_a_deleted_run_ends_its_answers(connect: Open, run: TrainingRun, renderer: Renderer) -> None:
    await sync_to_async(seed.add_checkpoint)(run, "one")
    socket = await connect(PATH)
    await socket.say_json(question(targets=[{"run": run.public_id}]))
    (row,) = await asked()
    await Operation.objects.filter(pk=row.pk).adelete()
    assert (await hear(socket, "error"))["error"] == "the run was deleted"


async def test_strangers_are_refused(connect: Open, cookie: str) -> None:
    stranger = await connect(PATH, with_cookie="")
    await stranger.say_json(question())
    assert await stranger.closing_code() == 4401
    assert not (await connect(PATH, origin="https://evil.example")).is_open
    socket = await connect(PATH)
    await socket.say("nonsense")
    assert await socket.closing_code() == 4400


async def test_who_is_signed_out_hears_nothing_more(
    connect: Open, cookie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlaygroundConsumer, "self_check_s", 0.2)
    socket = await connect(PATH)
    await socket.say(json.dumps({}))
    await hear(socket, "ready")
    await User.objects.filter(username="alice").aupdate(is_active=False)
    assert await socket.closing_code() == 4401
