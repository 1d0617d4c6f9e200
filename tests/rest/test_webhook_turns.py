"""Messages to many addresses: a bound for each, owners in turn, one process that sends and one task that waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import psycopg
import pytest
import redis
from django.conf import settings
from django.db.models.functions import Now

from runs import events
from runs.models import WebhookDelivery
from runs.services import webhooks
from runs.services.advisory_locks import LockClass
from runs.tasks import deliver_webhooks
from tests.rest.client import Rest
from tests.rest.receiver import Receiver
from tests.rest.test_webhooks import make_due, watch


def test_one_address_has_so_many_messages_waiting(alice: Rest) -> None:
    hook, other = (watch(alice, "https://example.org/hook", "run.failed") for _ in range(2))
    for _ in range(webhooks.MAX_PENDING):
        alice.post(f"webhooks/{hook['id']}/test", status=202)
    error = alice.refused("POST", f"webhooks/{hook['id']}/test", status=429)
    assert (error["code"], "20 messages" in error["message"]) == ("rate_limited", True)
    assert WebhookDelivery.objects.count() == webhooks.MAX_PENDING
    alice.post(f"webhooks/{other['id']}/test", status=202)
    WebhookDelivery.objects.filter(pk=WebhookDelivery.objects.earliest("pk").pk).update(given_up_at=Now())
    alice.post(f"webhooks/{hook['id']}/test", status=202)


def test_nobody_waits_behind_the_many_messages_of_somebody_else(
    alice: Rest, bob: Rest, receiver: Receiver
) -> None:
    for hook in [watch(alice, receiver.url, "run.failed") for _ in range(2)]:
        for _ in range(webhooks.MAX_PENDING):
            alice.post(f"webhooks/{hook['id']}/test", status=202)
    make_due(in_s=-60)
    hook = watch(bob, receiver.url, "run.failed")
    mine, second = (bob.post(f"webhooks/{hook['id']}/test", status=202) for _ in range(2))
    deliver_webhooks()
    told = [one.headers["mintweb-delivery"] for one in receiver.told]
    assert len(told) == 2 * webhooks.MAX_PENDING + 2
    assert {mine["id"], second["id"]} <= {*told[:16]}


def test_one_process_sends_at_a_time(alice: Rest, receiver: Receiver) -> None:
    hook = watch(alice, receiver.url, "run.failed")
    alice.post(f"webhooks/{hook['id']}/test", status=202)
    with psycopg.connect(**events.direct_parameters()) as other:
        other.execute("SELECT pg_advisory_lock(%s, 0)", [LockClass.WEBHOOKS])
        deliver_webhooks()
        assert receiver.told == []
        other.execute("SELECT pg_advisory_unlock(%s, 0)", [LockClass.WEBHOOKS])
    deliver_webhooks()
    assert len(receiver.told) == 1


@pytest.fixture
def queue() -> Iterator[Callable[[], int]]:
    """Return a function that counts the tasks that wait to send webhooks; at first there is none."""
    with redis.Redis.from_url(settings.REDIS_URL) as client:
        client.delete("webhooks")
        yield lambda: cast(int, client.llen("webhooks"))
        client.delete("webhooks")


def test_one_task_waits_at_most(
    alice: Rest, queue: Callable[[], int], django_capture_on_commit_callbacks: Any
) -> None:
    hook = watch(alice, "https://example.org/hook", "run.failed")
    for _ in range(3):
        with django_capture_on_commit_callbacks(execute=True):
            alice.post(f"webhooks/{hook['id']}/test", status=202)
        assert queue() == 1
