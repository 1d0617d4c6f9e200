"""Doorbells: typed hints to workers, waiting requests and open pages that rows have changed.

A hint carries no truth: whoever gets one reads the rows again, and everyone also looks by
themselves now and then, so a lost hint costs seconds. PostgreSQL's NOTIFY is sent inside the
transaction and so arrives after its commit; page hints go through the Channels layer on commit.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable
from typing import Any, Final, TypedDict

import redis.exceptions
from amqp.exceptions import ChannelError
from asgiref.sync import async_to_sync
from celery import current_app
from channels.layers import get_channel_layer
from django.db import connection, transaction
from kombu.exceptions import KombuError

logger = logging.getLogger(__name__)

WORK_CHANNEL: Final = "mintweb_work"
DONE_CHANNEL: Final = "mintweb_done"
RECIPES_CHANNEL: Final = "mintweb_recipes"
_NOTIFY_LIMIT: Final = 500
_PAGE_HINT_INTERVAL_S: Final = 0.25
_DRAIN_INTERVAL_S: Final = 1.0
# What Django gives psycopg beside libpq's parameters, and a limit meant for transactions.
_DJANGOS: Final = ("cursor_factory", "context", "prepare_threshold", "server_side_binding", "options")


class RunChanged(TypedDict):
    """Tells a page that the run has rows after its cursor."""

    type: str
    run: str


class SamplePartial(TypedDict):
    """Shows tokens of an unfinished sample: those from `start` on. A lost one is made good by the result."""

    type: str
    operation: int
    start: int
    tokens: list[int]
    is_last: bool


def sampling_group(sampling_session_pk: int) -> str:
    """Return the Channels group that sees the unfinished samples of one sampling session."""
    return f"sampling-{sampling_session_pk}"


def run_group(run_pk: int) -> str:
    """Return the Channels group of the pages that watch one run."""
    return f"run-{run_pk}"


def owner_group(owner_pk: int) -> str:
    """Return the Channels group of a person's run lists."""
    return f"owner-{owner_pk}"


def direct_parameters() -> dict[str, Any]:
    """Return psycopg's connection parameters of Django's database, for connections that are held open to listen."""
    parameters = connection.get_connection_params()
    return {name: str(value) for name, value in parameters.items() if name not in _DJANGOS and value}


def notify_done(operation_ids: Iterable[int]) -> None:
    """Wake the requests that wait for these operations when the current transaction commits."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, %s)", [DONE_CHANNEL, done_payload(operation_ids)])


def done_payload(operation_ids: Iterable[int]) -> str:
    """Return the text of a "done" notification; what does not fit is found by the waiters' own look."""
    return json.dumps(list(operation_ids)[:_NOTIFY_LIMIT], separators=(",", ":"))


def ring_workers() -> None:
    """Have the GPU workers look for work, and for what they are asked, when the current transaction commits."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, '')", [WORK_CHANNEL])


def ring_drain() -> None:
    """Send Celery's drain task soon after the current transaction commits."""
    transaction.on_commit(_drain_doorbell.ring)


def ring_recipes() -> None:
    """Wake the loop that trains runs without a client when the current transaction commits."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, '')", [RECIPES_CHANNEL])


def ring_dataset_check(version_pk: int) -> None:
    """Ask a CPU worker to check a dataset version; a lost message costs until the next housekeeping."""
    try:
        current_app.send_task("runs.tasks.check_dataset", args=[version_pk], queue="cpu")
    except (OSError, KombuError) as error:
        logger.warning("no doorbell for a dataset check, it begins late: %s", error)


def ring_webhooks() -> None:
    """Have messages to people's addresses sent when the current transaction commits; a lost one goes out later.

    One task that waits is enough for all of them.
    """
    transaction.on_commit(_send_webhooks_doorbell)


def _send_webhooks_doorbell() -> None:
    try:
        with current_app.producer_or_acquire() as producer:
            try:
                num_waiting = producer.channel.queue_declare("webhooks", passive=True).message_count
            except ChannelError:  # Redis has no queues that are empty
                num_waiting = 0
            if not num_waiting:
                current_app.send_task(
                    "runs.tasks.deliver_webhooks", queue="webhooks", expires=60, producer=producer
                )
    except (OSError, KombuError, redis.exceptions.RedisError) as error:
        logger.warning("no doorbell for webhooks, they go out some seconds later: %s", error)


def run_changed(run_pk: int, owner_pk: int, public_id: str) -> None:
    """Tell open pages about a run once the current transaction commits; at most 4 hints a second a run."""
    transaction.on_commit(lambda: _page_hints.send(run_pk, owner_pk, public_id))


class _DrainDoorbell:
    """Sends the drain task from a background thread, at most once a second while work streams in."""

    def __init__(self) -> None:
        self._ringing = threading.Event()
        self._thread: threading.Thread | None = None

    def ring(self) -> None:
        """Send the task soon; a worker that is at work already hears of more by NOTIFY."""
        self._ringing.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name="drain-doorbell", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        while self._ringing.wait():
            self._ringing.clear()
            try:
                current_app.send_task("gpuworker.tasks.drain", queue="gpu", expires=30)
            except (OSError, KombuError) as error:
                logger.warning("no doorbell for the GPU workers, they look by themselves: %s", error)
            time.sleep(_DRAIN_INTERVAL_S)


class _PageHints:
    """Sends page hints from one background thread, so that a slow or dead Redis delays nobody."""

    def __init__(self) -> None:
        self._pending: dict[int, tuple[int, str]] = {}
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def send(self, run_pk: int, owner_pk: int, public_id: str) -> None:
        """Remember that the run changed; hints of one run within an interval become one."""
        with self._wake:
            self._pending[run_pk] = (owner_pk, public_id)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._loop, name="page-hints", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._pending:
                    self._wake.wait()
                pending, self._pending = self._pending, {}
            for run_pk, (owner_pk, public_id) in pending.items():
                self._send_one(run_pk, owner_pk, public_id)
            time.sleep(_PAGE_HINT_INTERVAL_S)

    def _send_one(self, run_pk: int, owner_pk: int, public_id: str) -> None:
        layer: Any = get_channel_layer()
        message = RunChanged(type="run.changed", run=public_id)
        try:
            async_to_sync(layer.group_send)(run_group(run_pk), message)
            async_to_sync(layer.group_send)(owner_group(owner_pk), message)
        except (OSError, redis.exceptions.RedisError) as error:
            logger.warning("no page hint for run %s: %s", public_id, error)


_page_hints = _PageHints()
_drain_doorbell = _DrainDoorbell()
