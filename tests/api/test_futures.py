"""retrieve_future: waits, wakes quickly, and tells results and failures in the words clients read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from runs.api import decorators, waiters
from runs.api.decorators import in_thread
from runs.models import Operation, SamplingSession, TrainingRun, Worker
from runs.schemas import results
from runs.schemas import tinker_pb2 as pb
from runs.services import commits, workers
from runs.services.commits import Result
from tests.api import bodies
from tests.api.client import Actor, RawRequest, Stopwatch, operation_pk
from tests.services import rows
from tests.services.hand_worker import HandWorker

WAKE_S = 1.0
PROTO = {"accept": "application/x-protobuf"}
EITHER = {"accept": "application/x-protobuf, application/json"}
METRICS = {"loss:sum": 1.5}


@pytest.fixture
def step(run: TrainingRun) -> int:
    """An optimizer step that waits."""
    return rows.optim_step(run, 1)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition with a deadline."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def num_parked() -> int:
    return sum(len(events) for events in waiters.operations._events.values())


async def test_a_finished_operation_is_answered_at_once_and_again(
    alice: Actor, step: int, worker: HandWorker
) -> None:
    await in_thread(lambda: worker.finish(step, Result(body=b'{"metrics":{"a":1.0}}')))
    for _ in range(3):
        reply = await alice.poll(step)
        assert (reply.status_code, reply.json()) == (200, {"metrics": {"a": 1.0}})
        assert reply.headers["content-type"] == "application/json"


async def test_an_answer_that_was_deleted_is_gone(alice: Actor, step: int, worker: HandWorker) -> None:
    await in_thread(lambda: worker.finish(step, Result(body=b"{}")))
    await in_thread(lambda: Operation.objects.filter(pk=step).update(result=None))
    reply = await alice.poll(step)
    assert (reply.status_code, reply.json()["code"]) == (410, "result_expired")
    assert "kept for 24 hours" in reply.text


async def test_a_waiting_request_wakes_when_the_answer_is_committed(
    alice: Actor, step: int, worker: HandWorker
) -> None:
    polling = asyncio.create_task(alice.poll(step))
    await until(lambda: num_parked() == 1)
    await in_thread(lambda: worker.finish(step))
    with Stopwatch() as watch:
        reply = await polling
    assert (reply.status_code, reply.content) == (200, b"{}")
    assert watch.elapsed_s < WAKE_S
    assert num_parked() == 0


async def test_two_hundred_waiting_requests_are_all_answered(
    alice: Actor, run: TrainingRun, worker: HandWorker
) -> None:
    pks = [await alice.submit("optim_step", bodies.optim_step(run, seq)) for seq in range(1, 101)]
    polling = [asyncio.create_task(alice.poll(pk)) for pk in pks * 2]
    await until(lambda: num_parked() == 200)
    await in_thread(lambda: worker.finish(pks[-1]))
    async with asyncio.timeout(10):
        replies = await asyncio.gather(*polling)
    assert {reply.status_code for reply in replies} == {200}
    assert num_parked() == 0


async def test_a_client_that_leaves_is_not_waited_for(alice: Actor, step: int) -> None:
    request = RawRequest("retrieve_future", headers=[("x-api-key", alice.key)])
    left = asyncio.Event()
    body = json.dumps({"request_id": f"op-{step}"}).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        message = next(messages, None)
        if message is None:
            await left.wait()
            return {"type": "http.disconnect"}
        return message

    answering = asyncio.create_task(request.run(receive))
    await until(lambda: num_parked() == 1)
    left.set()
    async with asyncio.timeout(WAKE_S):
        await answering
    assert request.sent == []
    assert num_parked() == 0


async def test_a_request_that_is_cancelled_is_not_waited_for(alice: Actor, step: int) -> None:
    polling = asyncio.create_task(alice.poll(step))
    await until(lambda: num_parked() == 1)
    polling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await polling
    await until(lambda: num_parked() == 0)


async def test_not_yet_is_408_within_what_the_client_waits(alice: Actor, run: TrainingRun, step: int) -> None:
    await in_thread(lambda: TrainingRun.objects.filter(pk=run.pk).update(worker=workers.live().latest("pk")))
    with Stopwatch() as watch:
        reply = await alice.poll(step, x_stainless_read_timeout="0.5")
    assert 0.2 < watch.elapsed_s < 0.5 + WAKE_S
    assert reply.status_code == 408
    assert reply.json() == {
        "type": "try_again",
        "request_id": f"op-{step}",
        "queue_state": "active",
        "queue_state_reason": None,
    }


@pytest.mark.parametrize("patience", ["nonsense", "-1", "nan", "inf", "1e9", "45"])
async def test_an_odd_patience_means_the_usual_hold(alice: Actor, step: int, patience: str) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await alice.poll(step, x_stainless_read_timeout=patience)
    assert 20 <= decorators.HOLD_S <= 30  # the SDKs give up after 45 s


async def test_not_yet_tells_of_a_queue(alice: Actor, step: int) -> None:
    await in_thread(lambda: rows.make_run(alice.user))
    content = (await alice.poll(step, x_stainless_read_timeout="0.1")).json()
    assert content["queue_state"] == "paused_capacity"
    assert re.fullmatch(r"queued behind \d+ runs?", content["queue_state_reason"])


async def test_not_yet_names_a_gap(alice: Actor, run: TrainingRun) -> None:
    pk = await alice.submit("optim_step", bodies.optim_step(run, 3))
    content = (await alice.poll(pk, x_stainless_read_timeout="0.1")).json()
    assert content["queue_state"] == "paused_capacity"
    assert content["queue_state_reason"].startswith("waiting for seq_id 1, which has not arrived")


async def test_not_yet_says_that_no_worker_is_there(alice: Actor, step: int, gpu_worker: Worker) -> None:
    living = await in_thread(lambda: list(workers.live()))
    for worker in living:
        await in_thread(lambda worker=worker: workers.stop(worker))  # type: ignore[misc]
    reply = await alice.poll(step, x_stainless_read_timeout="0.1")
    await Worker.objects.filter(pk=gpu_worker.pk).aupdate(stopped_at=None)
    assert reply.status_code == 408
    assert reply.json()["queue_state"] == "paused_capacity"
    assert "no GPU worker is running" in reply.json()["queue_state_reason"]


@pytest.mark.parametrize("category", ["user", "server"])
async def test_a_failed_operation_is_200_with_its_error(
    alice: Actor, step: int, worker: HandWorker, category: str
) -> None:
    await in_thread(lambda: worker.finish(step, Result(error="it went wrong", category=category)))
    for accept in ({}, PROTO, EITHER):
        reply = await alice.poll(step, **accept)
        assert (reply.status_code, reply.json()) == (200, {"error": "it went wrong", "category": category})
        assert reply.headers["content-type"] == "application/json"


async def forward_backward_result(
    alice: Actor, run: TrainingRun, worker: HandWorker, logprobs: list[Any]
) -> Callable[..., Any]:
    pk = await alice.submit("forward_backward", bodies.forward_backward(run, 1))
    body = results.encode_forward_backward([np.array(array, "f4") for array in logprobs], METRICS)
    await in_thread(lambda: worker.finish(pk, Result(body=body, is_proto=True)))
    return lambda **headers: alice.poll(pk, **headers)


async def test_a_batch_is_answered_in_protobuf_or_json_as_accepted(
    alice: Actor, run: TrainingRun, worker: HandWorker
) -> None:
    poll = await forward_backward_result(alice, run, worker, [[-0.5, -1.0], [-2.0]])
    for accept in (PROTO, EITHER):
        reply: httpx.Response = await poll(**accept)
        assert reply.headers["content-type"] == "application/x-protobuf"
        assert dict(pb.ForwardBackwardOutput.FromString(reply.content).metrics) == METRICS
    content = (await poll(accept="application/json")).json()
    assert content["metrics"] == METRICS
    assert content["loss_fn_output_type"]
    assert content["loss_fn_outputs"][0]["logprobs"] == {
        "data": [-0.5, -1.0],
        "dtype": "float32",
        "shape": [2],
    }
    assert len(content["loss_fn_outputs"]) == 2


async def test_shapes_that_an_old_client_misreads_in_protobuf_are_sent_to_it_in_json(
    alice: Actor, run: TrainingRun, worker: HandWorker
) -> None:
    poll = await forward_backward_result(alice, run, worker, [[-0.5], [[-0.5, -1.0]]])
    assert (await poll(**EITHER)).headers["content-type"] == "application/json"
    assert (await poll(**PROTO)).headers["content-type"] == "application/x-protobuf"


async def test_a_sample_is_answered_in_protobuf_or_json_as_accepted(
    alice: Actor, sampling_session: SamplingSession
) -> None:
    reply = await alice.post("asample", bodies.sample(sampling_session))
    pk = operation_pk(reply)
    sequence = results.SampledSequence(
        tokens=np.array([5, 6]), logprobs=np.array([-0.5, -1.0], "f4"), stop_reason="stop"
    )
    output = results.SampleOutput(sequences=(sequence,), prompt_logprobs=np.array([np.nan, -1.0], "f4"))
    body = results.encode_sample(output)
    await in_thread(lambda: commits.commit_samples({pk: Result(body=body, is_proto=True)}))
    in_proto = await alice.poll(pk, **PROTO)
    assert in_proto.content == body
    content = (await alice.poll(pk, accept="application/json")).json()
    assert content["sequences"] == [{"stop_reason": "stop", "tokens": [5, 6], "logprobs": [-0.5, -1.0]}]
    assert content["prompt_logprobs"] == [None, -1.0]


async def test_a_poll_changes_nothing(alice: Actor, bob: Actor, step: int) -> None:
    before = await Operation.objects.filter(pk=step).values().aget()
    assert (await bob.poll(step)).status_code == 404
    assert (await alice.poll(step, x_stainless_read_timeout="0.1")).status_code == 408
    assert await Operation.objects.filter(pk=step).values().aget() == before


async def test_polls_of_a_finished_operation_are_quick(alice: Actor, step: int, worker: HandWorker) -> None:
    await in_thread(lambda: worker.finish(step))
    start = time.monotonic()
    replies = await asyncio.gather(*(alice.poll(step) for _ in range(100)))
    assert {reply.status_code for reply in replies} == {200}
    assert time.monotonic() - start < 5
