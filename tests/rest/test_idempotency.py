"""A POST with an Idempotency-Key happens once, also when it is sent many times at once."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.db import IntegrityError, connection
from django.db.models.functions import Now

from runs.models import Dataset, DatasetVersion, IdempotentReply, Recipe, TrainingRun, Webhook
from runs.services import dataset_checks, idempotency
from runs.services.idempotency import Answer
from runs.tasks import housekeeping
from tests.rest.client import Rest
from tests.rest.test_datasets import BYTES, FILE
from tests.rest.test_runs import settings_of
from tests.services.races import race

HOOK = {"url": "https://example.org/hook", "events": ["run.failed"]}


def test_the_same_request_starts_one_run(alice: Rest, version: DatasetVersion) -> None:
    body = settings_of(version)
    first = alice.send("POST", "runs", body, idempotency_key="nightly-7")
    again = alice.send("POST", "runs", body, idempotency_key="nightly-7")
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.content == again.content
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert TrainingRun.objects.count() == 1
    alice.post("runs", body, idempotency_key="nightly-8")
    assert TrainingRun.objects.count() == 2


def test_a_key_for_another_request_is_a_clear_mistake(alice: Rest) -> None:
    alice.post("webhooks", HOOK, idempotency_key="a")
    for method_path in ("webhooks", "runs", "checkpoints/delete"):
        error = alice.refused("POST", method_path, {**HOOK, "events": ["run.stopped"]}, idempotency_key="a")
        assert error["place"] == "Idempotency-Key"
        assert "another request" in error["message"]
    assert Webhook.objects.count() == 1


def test_a_key_is_of_its_user(alice: Rest, bob: Rest) -> None:
    mine = alice.post("webhooks", HOOK, idempotency_key="a")
    assert bob.post("webhooks", HOOK, idempotency_key="a")["id"] != mine["id"]


def test_a_refused_request_leaves_its_key_free(alice: Rest) -> None:
    alice.refused("POST", "webhooks", {**HOOK, "events": []}, idempotency_key="a")
    alice.post("webhooks", HOOK, idempotency_key="a")
    assert Webhook.objects.count() == 1


def test_a_failure_after_the_effect_leaves_nothing(alice: Rest, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: Any) -> None:
        raise IntegrityError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(idempotency, "_keep", breaks)
        alice.refused("POST", "webhooks", HOOK, status=500, idempotency_key="a")
    assert not Webhook.objects.exists()
    alice.post("webhooks", HOOK, idempotency_key="a")


@pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256])
def test_a_key_that_is_none_is_refused(alice: Rest, key: str) -> None:
    assert alice.refused("POST", "webhooks", HOOK, idempotency_key=key)["place"] == "Idempotency-Key"


def test_steering_happens_once(alice: Rest, recipe: Recipe) -> None:
    path = f"runs/{recipe.run.public_id}/pause"
    first = alice.post(path, status=200, idempotency_key="p")
    assert alice.post(path, status=200, idempotency_key="p") == first
    alice.refused("POST", path)


def test_an_upload_happens_once(alice: Rest) -> None:
    path = "datasets?name=sums"
    first = alice.post(path, FILE, content_type=BYTES, idempotency_key="u")
    alice.done("DELETE", f"datasets/{first['id']}", status=204)
    assert alice.post(path, FILE, content_type=BYTES, idempotency_key="u") == first
    assert not Dataset.objects.exists()
    error = alice.refused("POST", path, FILE + FILE, content_type=BYTES, idempotency_key="u")
    assert error["place"] == "Idempotency-Key"


def test_answers_are_kept_for_a_day(alice: Rest) -> None:
    first = alice.post("webhooks", HOOK, idempotency_key="a")
    IdempotentReply.objects.update(created_at=Now() - timedelta(hours=25))
    second = alice.post("webhooks", HOOK, idempotency_key="a")
    assert first["id"] != second["id"]
    IdempotentReply.objects.update(created_at=Now() - timedelta(hours=25))
    housekeeping()
    assert not IdempotentReply.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_many_at_once_are_one(transactional_db: None) -> None:
    alice = Rest.make("alice")
    calls = [functools.partial(alice.send, "POST", "webhooks", HOOK, idempotency_key="a") for _ in range(12)]
    replies = race(calls)
    assert {reply.status_code for reply in replies} == {201}
    assert len({reply.content for reply in replies}) == 1
    assert Counter("idempotency-replayed" in reply.headers for reply in replies) == {True: 11, False: 1}
    assert Webhook.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_many_at_once_with_other_bodies_are_one_and_refusals(transactional_db: None) -> None:
    alice = Rest.make("alice")
    calls = [
        functools.partial(
            alice.send,
            "POST",
            "webhooks",
            {**HOOK, "url": f"https://example.org/{number}"},
            idempotency_key="a",
        )
        for number in range(8)
    ]
    assert Counter(reply.status_code for reply in race(calls)) == {201: 1, 422: 7}
    assert Webhook.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_who_waits_too_long_is_told_to_come_back(
    transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "_PATIENCE_S", 0.2)
    alice = Rest.make("alice")
    has_begun, may_end = threading.Event(), threading.Event()

    def slow() -> Answer:
        has_begun.set()
        assert may_end.wait(30)
        return Answer(status=201, body=b"{}")

    def first() -> int:
        return idempotency.once(alice.user, "a", digest="0", answer=slow).status

    def second() -> int:
        assert has_begun.wait(30)
        try:
            reply = alice.send("POST", "webhooks", HOOK, idempotency_key="a")
            assert reply.headers["retry-after"] == "1"
            assert reply.json()["error"]["code"] == "still_answering"
            return reply.status_code
        finally:
            may_end.set()

    assert race([first, second]) == [201, 409]
    assert not Webhook.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_requests_that_are_being_answered_take_no_place_from_checks_of_datasets(
    transactional_db: None, add_rows: Callable[..., DatasetVersion]
) -> None:
    """Two of so many keys at once, whose numbers happen to be those of the places."""
    alice = Rest.make("somebody")
    classes: list[int] = []

    def look() -> Answer:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT classid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
            )
            classes.extend(row[0] for row in cursor.fetchall())
        return Answer(status=201, body=b"{}")

    idempotency.once(alice.user, "a", digest="0", answer=look)
    (lock_class,) = classes
    with psycopg.connect(**connection.get_connection_params(), autocommit=True) as other:
        for number in range(dataset_checks.NUM_SLOTS):
            other.execute("SELECT pg_advisory_lock(%s, %s)", [lock_class, number])
        add_rows([{"prompt": "What is 1 + 1?", "completion": "2"}])
