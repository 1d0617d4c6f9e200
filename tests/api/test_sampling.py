"""Sampling sessions and sample requests."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import pytest

from runs.api.decorators import in_thread
from runs.models import Checkpoint, Operation, SamplingSession, Session, TrainingRun, Worker
from runs.services import checkpoints
from tests.api import bodies
from tests.api.client import Actor, error_of, operation, operation_pk
from tests.services import rows


def create(session: Session, **changes: Any) -> dict[str, Any]:
    fields = {
        "session_id": session.public_id,
        "sampling_session_seq_id": 0,
        "type": "create_sampling_session",
    }
    return fields | changes


async def test_a_session_on_the_base_model(alice: Actor, session: Session) -> None:
    content = (
        await alice.post("create_sampling_session", create(session, base_model=rows.BASE_MODEL))
    ).json()
    sampler_id = f"{session.public_id}:sample:0"
    assert content == {"type": "create_sampling_session", "sampling_session_id": sampler_id}
    sampler = (await alice.get(f"samplers/{sampler_id}")).json()
    assert sampler == {"sampler_id": sampler_id, "base_model": rows.BASE_MODEL, "model_path": None}


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
async def test_a_session_on_a_checkpoint(alice: Actor, run: TrainingRun, session: Session, kind: str) -> None:
    await in_thread(lambda: rows.make_checkpoint(run, kind=kind))
    path = f"tinker://{run.public_id}/{kind}/one"
    reply = await alice.post("create_sampling_session", create(session, model_path=path))
    sampler = (await alice.get(f"samplers/{reply.json()['sampling_session_id']}")).json()
    assert (sampler["base_model"], sampler["model_path"]) == (rows.BASE_MODEL, path)
    assert (await SamplingSession.objects.aget(session=session)).run_id == run.pk


async def test_a_session_is_opened_once(alice: Actor, session: Session) -> None:
    body = create(session, base_model=rows.BASE_MODEL)
    replies = await asyncio.gather(*(alice.post("create_sampling_session", body) for _ in range(10)))
    assert len({reply.text for reply in replies}) == 1
    assert await SamplingSession.objects.filter(session=session).acount() == 1


async def test_the_number_of_a_session_does_not_change_its_weights(
    alice: Actor, session: Session, checkpoint: Checkpoint
) -> None:
    await alice.post("create_sampling_session", create(session, base_model=rows.BASE_MODEL))
    path = f"tinker://{checkpoint.run.public_id}/weights/one"
    error = error_of(await alice.post("create_sampling_session", create(session, model_path=path)), 422)
    assert error["place"] == "sampling_session_seq_id"


async def test_a_published_checkpoint_is_sampled_by_others(bob: Actor, checkpoint: Checkpoint) -> None:
    session = await in_thread(bob.new_session)
    path = f"tinker://{checkpoint.run.public_id}/weights/one"
    error_of(await bob.post("create_sampling_session", create(session, model_path=path)), 404)
    await in_thread(lambda: checkpoints.set_public(checkpoint, is_public=True))
    reply = await bob.post("create_sampling_session", create(session, model_path=path))
    sampling_session = await SamplingSession.objects.aget(public_id=reply.json()["sampling_session_id"])
    assert (sampling_session.owner_id, sampling_session.run_id) == (bob.user.pk, None)


async def test_a_checkpoint_that_was_taken_back_is_sampled_by_its_owner_alone(
    alice: Actor, bob: Actor, checkpoint: Checkpoint
) -> None:
    await in_thread(lambda: checkpoints.set_public(checkpoint, is_public=True))
    of_alice, of_bob = [
        await in_thread(partial(rows.make_sampling_session, who.user, checkpoint)) for who in (alice, bob)
    ]
    await bob.submit("asample", bodies.sample(of_bob, 0))
    await in_thread(lambda: checkpoints.set_public(checkpoint, is_public=False))
    error = error_of(await bob.post("asample", bodies.sample(of_bob, 1)), 404)
    assert "there is no checkpoint" in error["detail"]
    await alice.submit("asample", bodies.sample(of_alice, 1))


async def test_a_sampler_goes_on_once_its_base_model_can_be_loaded_again(
    alice: Actor, sampling_session: SamplingSession, session: Session, gpu_worker: Worker
) -> None:
    await in_thread(lambda: rows.report_base_model(gpu_worker, error="the folder is not mounted"))
    try:
        pk = await alice.submit("asample", bodies.sample(sampling_session, 0))
        assert "the folder is not mounted" in (await alice.poll(pk, x_stainless_read_timeout="1")).text
        new = create(session, base_model=rows.BASE_MODEL)
        error_of(await alice.post("create_sampling_session", new), 422)
    finally:
        await in_thread(lambda: rows.report_base_model(gpu_worker))


@pytest.mark.parametrize(
    "changes", [{}, {"base_model": "no/model"}, {"base_model": ""}, {"model_path": "mint:/x"}, {"sampling_session_seq_id": -1, "base_model": "mintweb/tiny"}]
)  # fmt: skip
async def test_a_session_needs_weights_there_are(
    alice: Actor, session: Session, changes: dict[str, Any]
) -> None:
    error_of(await alice.post("create_sampling_session", create(session, **changes)), 422)
    assert not await SamplingSession.objects.filter(session=session).aexists()


async def test_a_sample_is_in_the_log_with_an_id_for_each_sequence(
    alice: Actor, sampling_session: SamplingSession
) -> None:
    reply = await alice.post("asample", bodies.sample(sampling_session, 0, num_samples=3))
    content = reply.json()
    assert len(set(content["sample_sequence_ids"])) == 3
    assert all(isinstance(sequence_id, str) for sequence_id in content["sample_sequence_ids"])
    row = await operation(operation_pk(reply))
    assert (row.kind, row.seq, row.run_id, row.sampling_session_id) == (
        "sample",
        0,
        None,
        sampling_session.pk,
    )
    assert json.loads(bytes(row.payload or b""))["num_samples"] == 3


async def test_a_sample_sent_again_is_the_same_request(
    alice: Actor, sampling_session: SamplingSession
) -> None:
    body = bodies.sample(sampling_session, 2 * 10**9 + 1)
    replies = await asyncio.gather(*(alice.post("asample", body) for _ in range(20)))
    assert len({reply.text for reply in replies}) == 1
    other = bodies.sample(sampling_session, 2 * 10**9 + 1, num_samples=7)
    assert error_of(await alice.post("asample", other), 422)["code"] == "sequence_conflict"


async def test_samples_come_in_any_order(alice: Actor, sampling_session: SamplingSession) -> None:
    for seq in (9, 0, 5):
        await alice.submit("asample", bodies.sample(sampling_session, seq))
    assert await Operation.objects.filter(sampling_session=sampling_session).acount() == 3


def tokens(*values: object) -> dict[str, Any]:
    return {"chunks": [{"type": "encoded_text", "tokens": list(values)}]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": tokens(2048)}, "prompt[0]"),
    ({"prompt": tokens(-1)}, "prompt.chunks[0].tokens[0]"),
    ({"prompt": tokens(*([1] * 2049))}, "prompt"),
    ({"prompt": tokens()}, "prompt"),
    ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "prompt.chunks[0]"),
    ({"sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens"),
    ({"sampling_params": {"max_tokens": 10**9}}, "sampling_params.max_tokens"),
    ({"sampling_params": {"temperature": -1.0}}, "sampling_params.temperature"),
    ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
    ({"sampling_params": {"top_p": 2}}, "sampling_params.top_p"),
    ({"sampling_params": {"top_k": 0}}, "sampling_params.top_k"),
    ({"sampling_params": {"stop": ""}}, "sampling_params.stop"),
    ({"sampling_params": {"stop": ["x"] * 10_000}}, "sampling_params.stop"),
    ({"sampling_params": {"stop": ["a", 1]}}, "sampling_params.stop"),
    ({"num_samples": 10**6}, "num_samples"),
    ({"num_samples": 0}, "num_samples"),
    ({"seq_id": -1}, "seq_id"),
    ({"seq_id": 2**63}, "seq_id"),
    ({"prompt_alt_tokens_k": 3}, "prompt_alt_tokens_k"),
    ({"record_stability_info": True}, "record_stability_info"),
    ({"sampling_session_id": "nobody's"}, ""),
]


@pytest.mark.parametrize(("changes", "place"), BAD)
async def test_a_bad_sample_request_is_refused_at_its_place(
    alice: Actor, sampling_session: SamplingSession, changes: dict[str, Any], place: str
) -> None:
    reply = await alice.post("asample", bodies.sample(sampling_session, **changes))
    error = error_of(reply, 422 if place else 404)
    assert error.get("place", "") == place
    assert not await Operation.objects.filter(sampling_session=sampling_session).aexists()
    await alice.submit("asample", bodies.sample(sampling_session))
