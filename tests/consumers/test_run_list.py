"""The socket of the runs list: rows that changed, and new runs."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import transaction
from django.utils import timezone

from runs import consumers, events, run_list_consumer
from runs.models import TrainingRun, User, Worker
from runs.services import run_deletion
from tests.consumers.conftest import Open, make_worker
from tests.consumers.sockets import Socket
from tests.pages import seed

pytestmark = pytest.mark.django_db(transaction=True)
PATH = "/ws/runs/"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers.LiveConsumer, "self_check_s", 0.5)


async def hear_rows(socket: Socket) -> list[dict[str, Any]]:
    while True:
        message = await socket.hear()
        if message["rows"]:
            rows: list[dict[str, Any]] = message["rows"]
            return rows


async def hear_server(socket: Socket) -> str:
    while True:
        message = await socket.hear()
        if "server" in message:
            return str(message["server"])


def change(run: TrainingRun, name: str) -> None:
    with transaction.atomic():
        TrainingRun.objects.filter(pk=run.pk).update(name=name)
        events.run_changed(run.pk, run.owner_id, run.public_id)


async def test_a_changed_row_is_sent_as_the_page_renders_it(connect: Open, run: TrainingRun) -> None:
    socket = await connect(PATH)
    await socket.say_json({"rows": [run.public_id], "is_first_page": True})
    assert [row["run"] for row in await hear_rows(socket)] == [run.public_id]
    await sync_to_async(change)(run, "<b>renamed</b>")
    (row,) = await hear_rows(socket)
    assert "&lt;b&gt;renamed&lt;/b&gt;" in row["html"]
    assert row["is_new"] is False


async def test_an_unchanged_row_is_not_sent_again(connect: Open, run: TrainingRun) -> None:
    socket = await connect(PATH)
    await socket.say_json({"rows": [run.public_id], "is_first_page": True})
    await hear_rows(socket)
    for _ in range(3):
        assert (await socket.hear())["rows"] == []


@pytest.mark.parametrize("is_first_page", [True, False])
async def test_a_new_run_appears_on_the_first_page_alone(
    connect: Open, run: TrainingRun, is_first_page: bool
) -> None:
    socket = await connect(PATH)
    await socket.say_json({"rows": [run.public_id], "is_first_page": is_first_page})
    await hear_rows(socket)
    user = await User.objects.aget(username="alice")
    new = await sync_to_async(seed.make_run)(user, name="brand new")
    if is_first_page:
        (row,) = await hear_rows(socket)
        assert (row["run"], row["is_new"]) == (new.public_id, True)
    else:
        assert (await socket.hear())["rows"] == []


async def test_an_old_run_of_a_later_page_is_not_new(connect: Open, run: TrainingRun) -> None:
    user = await User.objects.aget(username="alice")
    idle = await sync_to_async(seed.make_run)(user, name="idle")
    long_ago = timezone.now() - timedelta(days=1)
    await TrainingRun.objects.filter(pk=idle.pk).aupdate(created_at=long_ago, last_applied_at=None)
    socket = await connect(PATH)
    await socket.say_json({"rows": [run.public_id], "is_first_page": True})
    assert [row["run"] for row in await hear_rows(socket)] == [run.public_id]
    new = await sync_to_async(seed.make_run)(user, name="brand new")
    assert [row["run"] for row in await hear_rows(socket)] == [new.public_id]


def be_active(run: TrainingRun, at: datetime) -> None:
    with transaction.atomic():
        TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=at)
        events.run_changed(run.pk, run.owner_id, run.public_id)


@pytest.fixture
async def three(cookie: str) -> list[TrainingRun]:
    """Return runs of alice's that did something a minute, an hour and a day ago; the last was made last."""
    user = await User.objects.aget(username="alice")
    runs = [await sync_to_async(seed.make_run)(user, name=name) for name in ("minute", "hour", "day")]
    for run, ago in zip(runs, (timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)), strict=True):
        await TrainingRun.objects.filter(pk=run.pk).aupdate(
            created_at=timezone.now() - 2 * ago, last_applied_at=timezone.now() - ago
        )
    return runs


@pytest.mark.parametrize(("ago", "place"), [(timedelta(0), 0), (timedelta(minutes=10), 1)])
async def test_a_run_of_a_later_page_that_does_something_comes_where_a_reload_shows_it(
    connect: Open, three: list[TrainingRun], ago: timedelta, place: int
) -> None:
    older, *shown = three[1], three[0], three[2]  # made before the last of those that are shown
    await sync_to_async(be_active)(older, timezone.now() - timedelta(days=2))
    socket = await connect(PATH)
    await socket.say_json({"rows": [run.public_id for run in shown], "is_first_page": True})
    assert [row["run"] for row in await hear_rows(socket)] == [run.public_id for run in shown]
    await sync_to_async(be_active)(older, timezone.now() - ago)
    (row,) = await hear_rows(socket)
    assert (row["run"], row["is_new"], row["before"]) == (older.public_id, True, shown[place].public_id)
    await sync_to_async(be_active)(older, timezone.now())
    (row,) = await hear_rows(socket)
    assert (row["run"], row["is_new"]) == (older.public_id, False)


async def test_a_later_page_takes_no_run_in_that_does_something(
    connect: Open, three: list[TrainingRun]
) -> None:
    older, shown = three[0], three[2]
    socket = await connect(PATH)
    await socket.say_json({"rows": [shown.public_id], "is_first_page": False})
    await hear_rows(socket)
    await sync_to_async(be_active)(older, timezone.now())
    for _ in range(2):
        assert (await socket.hear())["rows"] == []


async def test_a_full_list_takes_in_new_runs_alone(
    connect: Open, three: list[TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More runs than it holds may train at once; they must not push one another off for ever."""
    monkeypatch.setattr(run_list_consumer, "MAX_WATCHED_ROWS", 2)
    older, *shown = three[1], three[0], three[2]
    await sync_to_async(be_active)(older, timezone.now() - timedelta(days=2))
    socket = await connect(PATH)
    await socket.say_json({"rows": [run.public_id for run in shown], "is_first_page": True})
    await hear_rows(socket)
    await sync_to_async(be_active)(older, timezone.now())
    for _ in range(2):
        assert (await socket.hear())["rows"] == []
    new = await sync_to_async(seed.make_run)(await User.objects.aget(username="alice"))
    (row,) = await hear_rows(socket)
    assert (row["run"], row["before"]) == (new.public_id, shown[0].public_id)
    for _ in range(2):
        assert (await socket.hear())["rows"] == []


async def test_a_page_hears_of_workers_and_base_models_when_that_changes(
    connect: Open, run: TrainingRun
) -> None:
    socket = await connect(PATH)
    hello = {"rows": [run.public_id], "is_first_page": True}
    await socket.say_json(hello)
    first = await socket.hear()
    assert "No GPU worker is running" in first["server"]
    assert "not loaded yet" in first["server"]
    worker = await sync_to_async(make_worker)()
    after = await hear_server(socket)
    assert "No GPU worker is running" not in after
    assert "not loaded yet" not in after
    for _ in range(2):
        assert "server" not in await socket.hear()
    await Worker.objects.filter(pk=worker.pk).aupdate(drain_asked_at=timezone.now())
    assert "those that have it are drained" in await hear_server(socket)
    await Worker.objects.filter(pk=worker.pk).aupdate(stopped_at=timezone.now())
    gone = await hear_server(socket)
    assert "No GPU worker is running" in gone
    await socket.say_json(hello)  # as after a reconnect: nobody knows what the page shows
    assert await hear_server(socket) == gone


async def test_the_first_run_of_all_is_heard(connect: Open) -> None:
    socket = await connect(PATH)
    await socket.say_json({"rows": [], "is_first_page": True})
    await socket.hear()
    user = await User.objects.aget(username="alice")
    await sync_to_async(seed.make_run)(user)
    assert (await hear_rows(socket))[0]["is_new"] is True


async def test_a_full_list_lets_go_of_the_rows_that_new_runs_push_off(
    connect: Open, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_list_consumer, "MAX_WATCHED_ROWS", 1)
    socket = await connect(PATH)
    await socket.say_json({"rows": [run.public_id], "is_first_page": True})
    await hear_rows(socket)
    user = await User.objects.aget(username="alice")
    new = await sync_to_async(seed.make_run)(user)
    assert [row["run"] for row in await hear_rows(socket)] == [new.public_id]
    await sync_to_async(change)(run, "not watched any more")
    await sync_to_async(change)(new, "watched")
    assert [row["run"] for row in await hear_rows(socket)] == [new.public_id]
    assert (await socket.hear())["rows"] == []


async def test_other_peoples_rows_are_never_sent(connect: Open, run: TrainingRun) -> None:
    bob = await sync_to_async(seed.make_user)("bob")
    theirs = await sync_to_async(seed.make_run)(bob, name="bob's")
    socket = await connect(PATH)
    await socket.say_json({"rows": [theirs.public_id, run.public_id], "is_first_page": True})
    mine, foreign = await hear_rows(socket)
    assert mine["run"] == run.public_id
    assert foreign == {"run": theirs.public_id, "is_gone": True}  # as if it had never been


@pytest.mark.parametrize("message", ['{"rows": 1}', '{"rows": [1]}', "{}", "x"])
async def test_a_bad_message_ends_the_socket(connect: Open, message: str) -> None:
    socket = await connect(PATH)
    await socket.say(message)
    assert await socket.closing_code() == consumers.BAD_MESSAGE


async def test_a_deleted_run_leaves_the_list(connect: Open, run: TrainingRun) -> None:
    socket = await connect(PATH)
    other = await sync_to_async(seed.make_run)(await User.objects.aget(username="alice"))
    await socket.say_json({"rows": [run.public_id, other.public_id], "is_first_page": True})
    assert len(await hear_rows(socket)) == 2
    await sync_to_async(run_deletion.delete)(other)
    assert await hear_rows(socket) == [{"run": other.public_id, "is_gone": True}]
    for _ in range(2):
        assert (await socket.hear())["rows"] == []
