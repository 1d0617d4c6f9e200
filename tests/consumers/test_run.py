"""The socket of a run's page: everything after the cursor, each value once, for the owner alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.sessions.models import Session as BrowserSession
from django.db import transaction
from django.test import override_settings

from runs import consumers, events
from runs.models import TrainingRun, User
from runs.services import checkpoints, run_versions
from tests.consumers.conftest import Open
from tests.consumers.sockets import Socket, subscribed
from tests.pages import seed
from tests.services import rows

pytestmark = pytest.mark.django_db(transaction=True)


def path(run: TrainingRun) -> str:
    return f"/ws/runs/{run.public_id}/"


async def hear_points(socket: Socket, number: int) -> list[list[Any]]:
    points: list[list[Any]] = []
    while len(points) < number:
        points += (await socket.hear())["points"]
    return points


def add_steps(run: TrainingRun, first: int, last: int) -> None:
    with transaction.atomic():
        seed.add_values(
            run, [(2 * n, n, {"loss": 1 / n, "grad_norm": math.nan}) for n in range(first, last + 1)]
        )
        events.run_changed(run.pk, run.owner_id, run.public_id)


async def up_to_date(connect: Open, run: TrainingRun) -> Socket:
    """Return the socket of a page that shows all values of the run so far."""
    socket = await connect(path(run))
    await socket.say_json({"after": 10})
    await socket.hear()
    return socket


async def test_it_sends_everything_after_the_cursor(connect: Open, run: TrainingRun) -> None:
    socket = await connect(path(run))
    await socket.say_json({"after": -1})
    message = await socket.hear()
    assert len(message["points"]) == 25
    assert message["cursor"] == 10
    assert "live one" not in message["facts"]
    assert 'data-part="facts"' in message["facts"]

    later = await connect(path(run))
    await later.say_json({"after": 6})
    assert [point[0] for point in (await later.hear())["points"]] == [8] * 5 + [10] * 5


async def test_a_hint_brings_new_values_at_once_and_each_once(
    connect: Open, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers.LiveConsumer, "self_check_s", 3600.0)
    socket = await connect(path(run))
    await socket.say_json({"after": 10})
    assert (await socket.hear())["points"] == []
    await subscribed(events.run_group(run.pk))
    seen: list[int] = []
    for first in (6, 9, 12):
        await sync_to_async(add_steps)(run, first, first + 2)
        seen += [point[0] for point in await hear_points(socket, 6)]
    assert seen == [seq for n in range(6, 15) for seq in (2 * n, 2 * n)]


async def test_values_that_are_not_finite_arrive_as_words(connect: Open, run: TrainingRun) -> None:
    await sync_to_async(add_steps)(run, 6, 6)
    socket = await connect(path(run))
    await socket.say_json({"after": 10})
    points = (await socket.hear())["points"]
    assert [point[3:] for point in points] == [["grad_norm", "NaN"], ["loss", pytest.approx(1 / 6)]]


async def test_a_long_past_comes_in_bounded_messages(
    connect: Open, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers.RunConsumer, "max_points", 12)
    monkeypatch.setattr(consumers.LiveConsumer, "interval_s", 0.0)
    socket = await connect(path(run))
    await socket.say_json({"after": -1})
    points: list[list[Any]] = []
    while len(points) < 25:
        message = await socket.hear()
        assert len(message["points"]) <= 12
        points += message["points"]
    assert [point[0] for point in points] == [seq for seq in (2, 4, 6, 8, 10) for _ in range(5)]


async def test_without_redis_it_still_looks_by_itself(
    connect: Open, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers.LiveConsumer, "self_check_s", 0.3)
    nowhere = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": ["redis://127.0.0.1:1/0"]},
        }
    }
    with override_settings(CHANNEL_LAYERS=nowhere):
        socket = await up_to_date(connect, run)
        await sync_to_async(seed.add_values)(run, [(20, 10, {"loss": 0.5})])
        assert [point[0] for point in await hear_points(socket, 1)] == [20]


async def test_without_hints_it_tells_the_version_of_what_its_page_shows(
    connect: Open, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers.LiveConsumer, "self_check_s", 0.2)
    socket = await connect(path(run))
    await socket.say_json({"after": 10})
    assert "version" not in await socket.hear()
    before = await socket.hear()
    assert before["version"] == await sync_to_async(run_versions.version_of)(run.pk)
    assert (await socket.hear())["version"] == before["version"]
    await sync_to_async(seed.add_checkpoint)(run, "unheard")
    while (after := await socket.hear())["version"] == before["version"]:
        pass
    assert after["version"] == await sync_to_async(run_versions.version_of)(run.pk)


async def test_a_hint_spares_the_look(
    connect: Open, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers.LiveConsumer, "self_check_s", 3600.0)
    socket = await up_to_date(connect, run)
    await subscribed(events.run_group(run.pk))
    for first in (6, 9):
        await sync_to_async(add_steps)(run, first, first + 2)
        message = await socket.hear()
        assert message["changed"] is True
        assert "version" not in message


async def test_asking_again_from_an_older_cursor_sends_it_again(connect: Open, run: TrainingRun) -> None:
    socket = await up_to_date(connect, run)
    await socket.say_json({"after": 8})
    assert {point[0] for point in await hear_points(socket, 5)} == {10}


@pytest.mark.parametrize(
    "message", ['{"after": "x"}', '{"after": -2}', "[]", "nonsense", '{"after": true}', "{}"]
)
async def test_a_bad_message_ends_the_socket(connect: Open, run: TrainingRun, message: str) -> None:
    socket = await connect(path(run))
    await socket.say(message)
    assert await socket.closing_code() == consumers.BAD_MESSAGE


async def closing_code(socket: Socket) -> int:
    """Greet as a page does, and return with which code the server ends the socket without a word."""
    await socket.say_json({"after": -1})
    return await socket.closing_code()


async def test_others_are_refused(connect: Open, run: TrainingRun) -> None:
    """With a code, which a browser hears of an accepted socket alone."""
    assert await closing_code(await connect(path(run), with_cookie="")) == consumers.NOT_SIGNED_IN
    assert not (await connect(path(run), origin="https://evil.example")).is_open
    missing = "/ws/runs/00000000-0000-4000-8000-000000000000:train:0/"
    assert await closing_code(await connect(missing)) == consumers.NOT_FOUND
    assert await closing_code(await connect("/ws/runs/\0/")) == consumers.NOT_FOUND

    def give_away() -> None:
        TrainingRun.objects.filter(pk=run.pk).update(owner=seed.make_user("bob"))

    await sync_to_async(give_away)()
    assert await closing_code(await connect(path(run))) == consumers.NOT_FOUND


async def test_a_run_given_away_ends_the_socket(
    connect: Open, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers.LiveConsumer, "self_check_s", 0.2)
    socket = await up_to_date(connect, run)
    bob = await sync_to_async(seed.make_user)("bob")
    await TrainingRun.objects.filter(pk=run.pk).aupdate(owner=bob)
    assert await socket.closing_code() == consumers.NOT_FOUND


@pytest.mark.parametrize("how", ["switched off", "signed out", "new password"])
async def test_who_is_no_longer_signed_in_hears_nothing_more(
    connect: Open, run: TrainingRun, cookie: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(consumers.LiveConsumer, "self_check_s", 0.2)
    socket = await up_to_date(connect, run)
    if how == "switched off":
        await User.objects.filter(username="alice").aupdate(is_active=False)
    elif how == "signed out":
        await BrowserSession.objects.filter(session_key=cookie).adelete()
    else:
        await User.objects.filter(username="alice").aupdate(password="!another")
    assert await socket.closing_code() == consumers.NOT_SIGNED_IN


async def test_a_page_hears_of_its_checkpoints_and_forks(
    connect: Open, run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changes them, and though nothing of the run itself changes."""
    checkpoint = await sync_to_async(rows.make_checkpoint)(run)
    monkeypatch.setattr(consumers.LiveConsumer, "self_check_s", 3600.0)
    socket = await up_to_date(connect, run)
    await subscribed(events.run_group(run.pk))
    for change in (
        lambda: checkpoints.set_ttl(checkpoint, 3600),
        lambda: checkpoints.set_public(checkpoint, is_public=True),
        lambda: rows.make_fork(checkpoint, run.owner),
        lambda: checkpoints.delete(checkpoint),
    ):
        await sync_to_async(change)()
        assert (await socket.hear())["changed"] is True
