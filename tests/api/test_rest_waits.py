"""REST requests that ask to wait: held until what they wait for has ended, at the cost of no thread and no connection."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from django.core.signals import request_finished
from django.db import connection, connections
from django.db.models.functions import Now
from django.test import RequestFactory

from runs.api import rest_waits, waiters
from runs.api.decorators import in_thread
from runs.models import DatasetVersion, Recipe, SamplingSession, TrainingRun
from runs.rest import docs
from runs.rest.api import schema
from runs.services import commits, operations, training_runs
from runs.services.commits import Result
from runs.services.training_runs import DisplayState
from tests.api import bodies
from tests.api.client import Actor, RawRequest, Stopwatch, operation_pk, send
from tests.api.test_futures import until
from tests.api.test_outage import _reconnect, database_away  # noqa: F401 - a fixture
from tests.services import rows

REST = "/rest/v1/"
WAKE_S = 2.0
State = Recipe.State


@pytest.fixture(autouse=True)
def _connections_are_closed() -> Iterator[None]:
    """Close what Django's thread of a request leaves for the collector of garbage, which pytest would report."""

    def close(**_: object) -> None:
        connections.close_all()

    request_finished.connect(close)
    yield
    request_finished.disconnect(close)


async def get(actor: Actor, path: str, **headers: str) -> httpx.Response:
    """Send a GET to the REST API."""
    return await send("GET", REST + path, None, x_api_key=actor.key, **headers)


def num_parked() -> int:
    """Return how many requests wait for anything."""
    desks = (waiters.operations, waiters.runs, waiters.dataset_versions)
    return sum(len(events) for desk in desks for events in desk._events.values())


async def waited(getting: Any, act: Callable[[], object]) -> httpx.Response:
    """Do what is waited for once the request waits, and return what it is answered soon after."""
    answering = asyncio.ensure_future(getting)
    await until(lambda: num_parked() == 1)
    await asyncio.sleep(0.05)
    assert not answering.done()
    await in_thread(act)
    async with asyncio.timeout(WAKE_S):
        reply: httpx.Response = await answering
    assert num_parked() == 0
    return reply


@pytest.fixture
def recipe(run: TrainingRun) -> Recipe:
    """Let a recipe train alice's run, which is under way."""
    return rows.make_recipe(run, state=State.RUNNING)


async def test_a_sample_is_waited_for(alice: Actor, sampling_session: SamplingSession) -> None:
    pk = operation_pk(await alice.post("asample", bodies.sample(sampling_session)))
    fail = Result(error="out of memory", category="server")
    reply = await waited(get(alice, f"samples/op-{pk}?wait_s=30"), lambda: commits.commit_samples({pk: fail}))
    assert (reply.status_code, reply.json()["state"]) == (200, "failed")


async def test_the_former_name_waits_too(alice: Actor, sampling_session: SamplingSession) -> None:
    pk = operation_pk(await alice.post("asample", bodies.sample(sampling_session)))
    await waited(get(alice, f"samples/op-{pk}?wait=30"), lambda: operations.cancel_sample(pk))


@pytest.mark.parametrize("path", ["", "/status"])
@pytest.mark.parametrize("state", [State.FINISHED, State.STOPPED, State.DISCARDED, State.FAILED])
async def test_a_run_without_a_client_is_waited_for_until_it_has_ended(
    alice: Actor, recipe: Recipe, path: str, state: str
) -> None:
    def end() -> None:
        Recipe.objects.filter(pk=recipe.pk).update(state=state, ended_at=Now())

    address = f"runs/{recipe.run.public_id}{path}?wait_s=30"
    content = (await waited(get(alice, address), end)).json()
    assert content["is_over"] if path else content["state"] in ("finished", "stopped", "failed")


async def test_what_has_ended_already_is_not_waited_for(
    alice: Actor, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiters, "_LOOK_S", 60.0)
    await Recipe.objects.filter(pk=recipe.pk).aupdate(state=State.FINISHED, ended_at=Now())
    with Stopwatch() as watch:
        assert (await get(alice, f"runs/{recipe.run.public_id}/status?wait_s=30")).json()["is_over"]
    assert watch.elapsed_s < WAKE_S


async def test_a_pause_is_no_end(alice: Actor, recipe: Recipe) -> None:
    await Recipe.objects.filter(pk=recipe.pk).aupdate(state=State.PAUSED)
    with Stopwatch() as watch:
        reply = await get(alice, f"runs/{recipe.run.public_id}/status?wait_s=0.7")
    assert (reply.status_code, reply.json()["is_over"]) == (200, False)
    assert 0.7 <= watch.elapsed_s < 0.7 + WAKE_S


async def test_a_run_whose_client_trains_it_is_waited_for_until_it_is_let_go(
    alice: Actor, run: TrainingRun
) -> None:
    def let_go() -> None:
        TrainingRun.objects.filter(pk=run.pk).update(state=TrainingRun.State.CLOSED)

    reply = await waited(get(alice, f"runs/{run.public_id}?wait_s=30"), let_go)
    assert reply.json()["state"] == "finished"


async def test_a_run_that_is_deleted_meanwhile_is_not_waited_for(alice: Actor, recipe: Recipe) -> None:
    run = recipe.run
    reply = await waited(
        get(alice, f"runs/{run.public_id}?wait_s=30"),
        lambda: TrainingRun.objects.filter(pk=run.pk).delete(),
    )
    assert reply.status_code == 404


async def test_a_dataset_version_is_waited_for_until_it_is_checked(alice: Actor, recipe: Recipe) -> None:
    version = recipe.dataset_version
    reply = await waited(
        get(alice, f"datasets/{version.dataset.public_id}/versions/1?wait_s=30"),
        lambda: DatasetVersion.objects.filter(pk=version.pk).update(state=DatasetVersion.State.NEEDS_MAPPING),
    )
    assert reply.json()["state"] == "needs_mapping"


async def test_many_wait_without_a_thread_or_a_connection_of_their_own(alice: Actor, recipe: Recipe) -> None:
    def num_connections() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            return int(cursor.fetchone()[0])

    address = f"runs/{recipe.run.public_id}/status?wait_s=30"
    warm = [asyncio.create_task(get(alice, address)) for _ in range(20)]
    await until(lambda: num_parked() == 20)
    threads, connected = threading.active_count(), await in_thread(num_connections)
    waiting = [*warm, *(asyncio.create_task(get(alice, address)) for _ in range(180))]
    await until(lambda: num_parked() == 200)
    assert threading.active_count() < threads + 20  # a pool may grow to its size
    assert await in_thread(num_connections) < connected + 20
    await Recipe.objects.filter(pk=recipe.pk).aupdate(state=State.FINISHED, ended_at=Now())
    async with asyncio.timeout(20):
        replies = await asyncio.gather(*waiting)
    assert {(reply.status_code, reply.json()["is_over"]) for reply in replies} == {(200, True)}
    assert num_parked() == 0


@pytest.mark.parametrize(
    ("query", "place", "message"),
    [
        ("wait_s=31", "wait_s", "less than or equal to 30"),
        ("wait_s=-1", "wait_s", "greater than or equal to 0"),
        ("wait_s=nan", "wait_s", "than or equal to"),
        ("wait_s=", "wait_s", "number"),
        ("wait_s=soon", "wait_s", "number"),
        ("wait_s=5&wait_s=6", "wait_s", "given 2 times"),
        ("wait_s=30&states=x", "states", "unknown query parameter 'states'"),
    ],
)
@pytest.mark.parametrize(
    "path", ["runs/{run}", "runs/{run}/status", "samples/op-1", "datasets/ds-1/versions/1"]
)
async def test_what_cannot_be_waited_is_refused_at_once(
    alice: Actor, recipe: Recipe, path: str, query: str, place: str, message: str
) -> None:
    with Stopwatch() as watch:
        reply = await get(alice, f"{path.format(run=recipe.run.public_id)}?{query}")
    error = reply.json()["error"]
    assert (reply.status_code, error["place"]) == (422, place)
    assert message in error["message"]
    assert watch.elapsed_s < WAKE_S


async def test_both_names_at_once_are_refused(alice: Actor, sampling_session: SamplingSession) -> None:
    pk = operation_pk(await alice.post("asample", bodies.sample(sampling_session)))
    reply = await get(alice, f"samples/op-{pk}?wait=30&wait_s=30")
    assert (reply.status_code, reply.json()["error"]["place"]) == (422, "wait")


async def test_who_may_not_see_it_does_not_wait(alice: Actor, bob: Actor, recipe: Recipe) -> None:
    address = f"runs/{recipe.run.public_id}/status?wait_s=30"
    with Stopwatch() as watch:
        assert (await get(bob, address)).status_code == 404
        assert (await get(alice, "runs/none?wait_s=30")).status_code == 404
        assert (await send("GET", REST + address)).status_code == 401
        assert (await send("GET", REST + address, x_api_key="tml-unknown")).status_code == 401
        assert (await get(alice, f"runs/{recipe.run.public_id}%00?wait_s=30")).status_code == 404
    assert watch.elapsed_s < WAKE_S


def asking(actor: Actor, recipe: Recipe) -> RawRequest:
    """Return a request that waits for the recipe's run."""
    request = RawRequest("", headers=[("x-api-key", actor.key)], method="GET")
    path = f"{REST}runs/{recipe.run.public_id}/status"
    request.scope |= {"path": path, "raw_path": path.encode(), "query_string": b"wait_s=30"}
    return request


def empty_body(left: asyncio.Event) -> Any:
    """Return a `receive` that gives no body, and tells when the client has left."""
    messages: Any = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict[str, Any]:
        message: dict[str, Any] | None = next(messages, None)
        if message is None:
            await left.wait()
            return {"type": "http.disconnect"}
        return message

    return receive


async def test_those_who_waited_for_one_thing_take_turns(alice: Actor, recipe: Recipe) -> None:
    num_now: list[int] = [0]
    nums: list[int] = []

    async def django(scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        num_now[0] += 1
        nums.append(num_now[0])
        await asyncio.sleep(0.01)
        num_now[0] -= 1

    async def send_out(message: Any) -> None:
        raise AssertionError("nothing is sent here")

    app = rest_waits.RestWaits(django)
    scope = asking(alice, recipe).scope
    waiting = [asyncio.create_task(app(scope, empty_body(asyncio.Event()), send_out)) for _ in range(50)]
    await until(lambda: num_parked() == 50)
    await Recipe.objects.filter(pk=recipe.pk).aupdate(state=State.FINISHED, ended_at=Now())
    async with asyncio.timeout(WAKE_S):
        await asyncio.gather(*waiting)
    assert len(nums) == 50
    assert max(nums) == rest_waits._MAX_AT_ONCE


async def test_a_client_that_leaves_is_not_waited_for(alice: Actor, recipe: Recipe) -> None:
    request, left = asking(alice, recipe), asyncio.Event()
    answering = asyncio.create_task(request.run(empty_body(left)))
    await until(lambda: num_parked() == 1)
    left.set()
    async with asyncio.timeout(WAKE_S):
        await answering
    assert request.sent == []
    assert num_parked() == 0


async def test_waiting_goes_on_after_the_database_was_away(alice: Actor, recipe: Recipe) -> None:
    held = asyncio.create_task(get(alice, f"runs/{recipe.run.public_id}/status?wait_s=30"))
    await until(lambda: num_parked() == 1)
    async with database_away():
        await asyncio.sleep(3 * waiters._LOOK_S)  # long enough for a look at the rows to fail
    assert not held.done()
    await in_thread(lambda: Recipe.objects.filter(pk=recipe.pk).update(state=State.FINISHED, ended_at=Now()))
    async with asyncio.timeout(10):
        assert (await held).json()["is_over"]


async def test_an_unchanged_run_is_304_after_the_time(alice: Actor, recipe: Recipe) -> None:
    address = f"runs/{recipe.run.public_id}?wait_s=0.3"
    tag = (await get(alice, address)).headers["etag"]
    with Stopwatch() as watch:
        assert (await get(alice, address, if_none_match=tag)).status_code == 304
    assert watch.elapsed_s >= 0.3


def test_the_addresses_that_wait_are_those_whose_description_says_so(rf: RequestFactory) -> None:
    offered = {
        path
        for path, methods in schema()["paths"].items()
        if "wait_s" in [one["name"] for one in methods.get("get", {}).get("parameters", [])]
    }
    example = {"run_id": "x", "sample_id": "op-1", "dataset_id": "ds-1", "number": "1"}
    held = {
        path
        for path in schema()["paths"]
        if rest_waits._wait_of(
            {"method": "GET", "path": re.sub(r"{(\w+)}", lambda found: example.get(found[1], "x"), path)}
            | {"query_string": b"wait_s=1"}
        )
    }
    assert offered == held
    assert len(held) == 4
    page = docs.page(rf.get("/rest/v1/docs"), schema()).content.decode()
    assert page.count("?wait_s=30") == 4


def test_a_run_is_over_in_the_states_that_the_documentation_names() -> None:
    assert {state.value for state in training_runs.OVER} == {"finished", "stopped", "failed"}
    assert DisplayState.PARKED not in training_runs.OVER
