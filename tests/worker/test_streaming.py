"""Samples that are shown while they are drawn: pieces arrive in order, the result stands, a stop ends the drawing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from channels.layers import get_channel_layer
from django.test import override_settings

from runs import events
from runs.models import Operation, SamplingSession, User
from runs.schemas import requests, results
from runs.schemas.sampling import Sample, StoredSample
from runs.services import operations, sampling, sessions
from runs.services.operations import Submission
from tests.worker.conftest import Client, Start, drawing_no_end, finished, wait_for

NEVER_STOP: list[int] = []
NOWHERE = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": ["redis://127.0.0.1:1/0"]},
    }
}


def ask(session: SamplingSession, *, seq: int = 0, num_tokens: int = 100, stream: bool = True) -> int:
    body = StoredSample.model_validate(
        {
            "sampling_session_id": session.public_id,
            "seq_id": seq,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
            "sampling_params": {"max_tokens": num_tokens, "seed": 7, "stop": NEVER_STOP},
            "stream": stream,
        }
    )
    payload = requests.canonical_json(body)
    return operations.submit_sample(session, Submission(kind=Operation.Kind.SAMPLE, seq=seq, payload=payload))


def heard(session: SamplingSession, submit: Callable[[], int]) -> tuple[int, list[dict[str, Any]]]:
    """Submit, and return everything that is shown until the sample says that it is done."""

    async def listen() -> tuple[int, list[dict[str, Any]]]:
        layer: Any = get_channel_layer()
        channel = await layer.new_channel()
        await layer.group_add(events.sampling_group(session.pk), channel)
        pk = await asyncio.get_running_loop().run_in_executor(None, _closing, submit)
        partials: list[dict[str, Any]] = []
        while not partials or not partials[-1]["is_last"]:
            partials.append(await asyncio.wait_for(layer.receive(channel), 60))
        return pk, partials

    return asyncio.run(listen())


def _closing(submit: Callable[[], int]) -> int:
    from django.db import connections

    try:
        return submit()
    finally:
        connections.close_all()


def test_tokens_are_shown_while_they_are_drawn(start_worker: Start, session: SamplingSession) -> None:
    start_worker()
    pk, partials = heard(session, lambda: ask(session, num_tokens=200))
    tokens: list[int] = []
    for partial in partials[:-1]:
        assert partial["operation"] == pk
        assert partial["start"] == len(tokens)
        tokens += partial["tokens"]
    output = results.decode_sample(bytes(finished(pk).result or b""))
    drawn = output.sequences[0].tokens.tolist()
    assert len(drawn) == 200
    assert tokens
    assert tokens == drawn[: len(tokens)]


def test_what_is_shown_does_not_change_the_answer(start_worker: Start, session: SamplingSession) -> None:
    start_worker()
    shown, quiet = (finished(ask(session, seq=seq, stream=seq == 0)) for seq in (0, 1))
    assert shown.result == quiet.result


def test_a_dead_redis_delays_no_answer(start_worker: Start, session: SamplingSession) -> None:
    with override_settings(CHANNEL_LAYERS=NOWHERE):
        start_worker()
        assert finished(ask(session)).state == Operation.State.DONE


def test_a_stopped_sample_is_not_drawn_to_its_end(start_worker: Start, session: SamplingSession) -> None:
    worker = start_worker()
    desk = worker.scheduler._desk
    with drawing_no_end(worker):
        pk = ask(session, num_tokens=250)
        wait_for(lambda: desk.has_work, what="drawing")
        assert operations.cancel_sample(pk)
        row = finished(pk)
        assert (row.state, row.error, row.error_category) == (Operation.State.FAILED, "stopped", "user")
        wait_for(lambda: not desk.has_work, what="the end of drawing")
    assert not operations.cancel_sample(pk)
    assert finished(ask(session, seq=1, num_tokens=3)).state == Operation.State.DONE


def test_a_training_checkpoint_answers_and_is_read_once(
    start_worker: Start, new_client: Callable[..., Client], alice: User
) -> None:
    start_worker()
    client = new_client()
    client.forward_backward([1, 2, 3, 4, 5])
    client.optim_step(learning_rate=0.5)
    finished(client.save("one"))
    checkpoint = client.run.checkpoints.get()
    session = sampling.create_sampling_session(
        sessions.create_session(alice), seq_id=0, base_model=client.run.base_model, checkpoint=checkpoint
    )
    first = finished(ask(session, num_tokens=5))
    assert first.state == Operation.State.DONE, first.error
    from django.core.files.storage import default_storage

    default_storage.delete(f"{checkpoint.directory}/adapter_model.safetensors")
    again = finished(ask(session, seq=1, num_tokens=5))
    assert again.result == first.result


def test_a_client_cannot_ask_to_be_shown() -> None:
    body = {
        "sampling_session_id": "s",
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
        "stream": True,
    }
    stored = requests.canonical_json(Sample.model_validate(body))
    assert "stream" not in json.loads(stored)
    assert not requests.from_canonical(StoredSample, stored).stream
