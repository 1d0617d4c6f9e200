"""Webhooks: told of ends and thresholds by signed messages, again after a failure, never inside the network."""

from __future__ import annotations

import math
import socket
from datetime import timedelta
from typing import Any

import pytest
from django.db.models.functions import Now
from django.utils import timezone
from pytest_django.fixtures import Settings

from runs.models import Operation, Recipe, TrainingRun, Webhook, WebhookDelivery
from runs.services import commits, recipe_steps, sessions, webhooks
from runs.services.recipe_rows import State
from runs.tasks import deliver_webhooks, housekeeping
from tests.rest.client import Rest
from tests.rest.receiver import Receiver, receiving
from tests.services import rows
from tests.services.hand_worker import HandWorker, applied, commit_of


def watch(alice: Rest, url: str, *events: str, **body: Any) -> dict[str, Any]:
    """Make a webhook."""
    made: dict[str, Any] = alice.post("webhooks", {"url": url, "events": list(events), **body})
    return made


def deliveries(alice: Rest, hook: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the address was told, oldest first."""
    return list(alice.walk(f"webhooks/{hook['id']}/deliveries"))[::-1]


def test_a_webhook_is_made_changed_and_deleted(alice: Rest) -> None:
    made = watch(alice, "https://example.org/hook", "run.failed", "run.finished")
    assert made.pop("secret").startswith("whsec_")
    path = f"webhooks/{made['id']}"
    assert alice.get(path) == made == alice.get("webhooks")["items"][0]
    tag = alice.send("GET", path).headers["etag"]
    shown = alice.done("PATCH", path, {"is_active": False, "events": ["run.stopped"]}, if_match=tag)
    assert (shown["is_active"], shown["events"]) == (False, ["run.stopped"])
    assert alice.refused("PATCH", path, {"is_active": True}, status=412, if_match=tag)["place"] == "If-Match"
    shown = alice.done(
        "PATCH", path, {"events": ["metric.threshold"], "threshold": {"metric": "loss", "above": 5.0}}
    )
    assert shown["threshold"] == {"metric": "loss", "above": 5.0, "below": None}
    assert alice.get(path) == shown
    alice.done("DELETE", path, status=204)
    assert not Webhook.objects.exists()


@pytest.mark.parametrize(
    ("body", "place", "message"),
    [
        ({"url": "https://example.org/", "events": []}, "events", "at least 1"),
        ({"url": "https://example.org/", "events": ["run.begun"]}, "events[0]", "'run.finished'"),
        ({"url": "https://example.org/", "events": ["metric.threshold"]}, "", "go together"),
        (
            {
                "url": "https://example.org/",
                "events": ["run.failed"],
                "threshold": {"metric": "a", "above": 1},
            },
            "",
            "go together",
        ),
        (
            {"url": "https://example.org/", "events": ["metric.threshold"], "threshold": {"metric": "a"}},
            "threshold",
            "above or below",
        ),
        ({"url": "ftp://example.org/", "events": ["run.failed"]}, "url", "pattern"),
        ({"url": "https://a b/", "events": ["run.failed"]}, "url", "pattern"),
        ({"url": "https:///nowhere", "events": ["run.failed"]}, "url", "host"),
        ({"url": "https://me:pw@example.org/", "events": ["run.failed"]}, "url", "user name"),
        ({"url": "https://[::1", "events": ["run.failed"]}, "url", ""),
        ({"url": "http://a..b/x", "events": ["run.failed"]}, "url", "'a..b' is no host name"),
        ({"url": f"http://{'a' * 64}.org/", "events": ["run.failed"]}, "url", "1 to 63 valid characters"),
        ({"url": "http://xn--/", "events": ["run.failed"]}, "url", "'xn--' is no host name"),
        ({"url": "http://8.8.8.8:99999/", "events": ["run.failed"]}, "url", "1 to 65535, got 99999"),
    ],
)
def test_a_webhook_that_cannot_be_is_named(alice: Rest, body: Any, place: str, message: str) -> None:
    error = alice.refused("POST", "webhooks", body)
    assert error["place"] == place
    assert message in error["message"]
    assert not Webhook.objects.exists()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "100.64.0.1",
        "[::1]",
        "[fd00::1]",
        "[fe80::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ],
)
def test_an_address_inside_the_network_is_refused(alice: Rest, host: str) -> None:
    for url in (f"http://{host}/", f"https://{host}:8443/x"):
        error = alice.refused("POST", "webhooks", {"url": url, "events": ["run.failed"]})
        assert error["place"] == "url"
        assert "MINTWEB_WEBHOOK_HOSTS" in error["message"]


def test_a_change_to_an_address_inside_the_network_is_refused(alice: Rest) -> None:
    made = watch(alice, "https://example.org/hook", "run.failed")
    error = alice.refused("PATCH", f"webhooks/{made['id']}", {"url": "http://10.0.0.1/"})
    assert error["place"] == "url"
    assert alice.get(f"webhooks/{made['id']}")["url"] == "https://example.org/hook"


def test_a_name_of_an_address_inside_the_network_is_told_nothing(alice: Rest, settings: Settings) -> None:
    with receiving() as receiver:
        hook = watch(alice, f"http://localhost:{receiver.port}/hook", "run.failed")
        alice.post(f"webhooks/{hook['id']}/test", status=202)
        deliver_webhooks()
        assert receiver.told == []
    (delivery,) = deliveries(alice, hook)
    assert (delivery["state"], delivery["num_attempts"]) == ("pending", 1)
    assert delivery["last_answer"].startswith("refused: localhost is ")


def test_a_user_has_so_many_webhooks_and_no_more(alice: Rest, bob: Rest) -> None:
    for number in range(webhooks.MAX_PER_USER):
        watch(alice, f"https://example.org/{number}", "run.failed")
    error = alice.refused("POST", "webhooks", {"url": "https://example.org/", "events": ["run.failed"]})
    assert "20" in error["message"]
    watch(bob, "https://example.org/", "run.failed")


def test_a_test_message_comes_signed(alice: Rest, receiver: Receiver) -> None:
    hook = watch(alice, receiver.url, "run.failed")
    sent = alice.post(f"webhooks/{hook['id']}/test", status=202)
    assert sent["state"] == "pending"
    deliver_webhooks()
    (told,) = receiver.told
    assert told.path == "/hook?for=me"
    assert told.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert told.headers["content-type"] == "application/json"
    assert (told.headers["mintweb-event"], told.headers["mintweb-delivery"]) == ("test", sent["id"])
    assert (told.content["event"], told.content["id"]) == ("test", sent["id"])
    assert told.is_signed_with(hook["secret"])
    assert not told.is_signed_with("whsec_other")
    (delivery,) = deliveries(alice, hook)
    assert (delivery["state"], delivery["last_answer"]) == ("delivered", "200 thanks")
    deliver_webhooks()
    assert len(receiver.told) == 1


def test_ends_of_a_run_are_told_to_who_asked(
    alice: Rest, bob: Rest, receiver: Receiver, recipe: Recipe
) -> None:
    watch(alice, receiver.url, "run.finished", "run.failed")
    watch(bob, receiver.url, "run.finished", "run.failed")
    watch(alice, receiver.url, "run.stopped")
    recipe_steps.fail(recipe, "out of memory")
    recipe_steps.fail(recipe, "again")
    deliver_webhooks()
    (told,) = receiver.told
    assert told.content["event"] == "run.failed"
    assert told.content["run"]["id"] == recipe.run.public_id
    assert told.content["run"]["error"] == "out of memory"
    alice.post(f"runs/{recipe.run.public_id}/stop", status=422)
    Recipe.objects.filter(pk=recipe.pk).update(state=State.FINISHING, queued_at=Now())
    recipe_steps.end(Recipe.objects.get(pk=recipe.pk), State.FINISHED)
    deliver_webhooks()
    assert [one.content["event"] for one in receiver.told] == ["run.failed", "run.finished"]
    Recipe.objects.filter(pk=recipe.pk).update(state=State.STOPPING)
    recipe_steps.end(Recipe.objects.get(pk=recipe.pk), State.STOPPED)
    deliver_webhooks()
    assert [one.content["event"] for one in receiver.told][2:] == ["run.stopped"]
    assert receiver.told[1].content["run"]["step"] == 30


def test_a_run_that_its_client_closed_is_told(alice: Rest, receiver: Receiver) -> None:
    watch(alice, receiver.url, "run.finished")
    rows.make_worker()
    run = rows.make_run(alice.user)
    TrainingRun.objects.filter(pk=run.pk).update(state=TrainingRun.State.CLOSED)
    webhooks.client_ended(run.pk)
    deliver_webhooks()
    assert receiver.told[0].content["run"]["id"] == run.public_id


@pytest.mark.parametrize(
    ("reason", "event", "error"),
    [
        ("success", "run.finished", ""),
        ("errored", "run.stopped", "its client closed the session as errored"),
    ],
)
def test_a_run_that_ended_with_its_session_is_told_with_the_reason(
    reason: str, event: str, error: str, alice: Rest, receiver: Receiver
) -> None:
    watch(alice, receiver.url, "run.finished", "run.stopped")
    rows.make_worker()
    run = rows.make_run(alice.user)
    sessions.finish(run.session, reason)
    TrainingRun.objects.filter(pk=run.pk).update(state=TrainingRun.State.CLOSED)
    webhooks.client_ended(run.pk)
    deliver_webhooks()
    (told,) = receiver.told
    assert (told.content["event"], told.content["run"]["error"]) == (event, error)


@pytest.mark.parametrize(
    ("side", "bound", "values", "crossed"),
    [
        ("above", 3.0, [2.0, 3.0, 3.5, 4.0], 3.5),
        ("below", 1.0, [2.0, 0.5, 0.25], 0.5),
        ("above", 3.0, [math.inf], None),
    ],
)
def test_a_threshold_is_told_once_a_run(
    alice: Rest, receiver: Receiver, side: str, bound: float, values: list[float], crossed: float | None
) -> None:
    hook = watch(alice, receiver.url, "metric.threshold", threshold={"metric": "grad_norm", side: bound})
    rows.make_worker()
    run, worker = rows.make_run(alice.user), HandWorker()
    held = worker.hold(run)
    cycle = [applied(Operation.objects.get(run=run, seq=0).pk, 0)]
    cycle += [
        applied(rows.optim_step(run, seq), seq, metrics={"grad_norm": value, "loss": 99.0})
        for seq, value in enumerate(values, 1)
    ]
    assert commits.commit_all([commit_of(held, cycle)]) == [True]
    deliver_webhooks()
    (told,) = receiver.told
    step = next(index for index, value in enumerate(values, 1) if crossed is None or value == crossed)
    assert told.content["metric"] == {
        "name": "grad_norm",
        "step": step,
        "value": crossed,
        "threshold": f"grad_norm {side} {bound}",
    }
    assert told.is_signed_with(hook["secret"])


def make_due(*, in_s: float = 0) -> None:
    """Let what waits be due."""
    WebhookDelivery.objects.filter(delivered_at=None).update(
        next_attempt_at=timezone.now() + timedelta(seconds=in_s)
    )


def test_a_failure_is_tried_again_later_and_later(alice: Rest, receiver: Receiver) -> None:
    receiver.statuses = [500, 404, 503]
    hook = watch(alice, receiver.url, "run.failed")
    alice.post(f"webhooks/{hook['id']}/test", status=202)
    delays = []
    for answer in ("500 thanks", "404 thanks", "503 thanks"):
        make_due()
        deliver_webhooks()
        deliver_webhooks()  # it is not due yet
        (delivery,) = deliveries(alice, hook)
        assert (delivery["state"], delivery["last_answer"]) == ("pending", answer)
        row = WebhookDelivery.objects.get()
        delays.append((row.next_attempt_at - timezone.now()).total_seconds())
    assert delays == pytest.approx([10, 20, 40], abs=2)
    make_due()
    deliver_webhooks()
    (delivery,) = deliveries(alice, hook)
    assert (delivery["state"], delivery["num_attempts"]) == ("delivered", 4)
    assert len({told.headers["mintweb-delivery"] for told in receiver.told}) == 1
    assert all(told.is_signed_with(hook["secret"]) for told in receiver.told)


def test_it_is_given_up_in_the_end(alice: Rest, receiver: Receiver) -> None:
    receiver.statuses = [500] * 20
    hook = watch(alice, receiver.url, "run.failed")
    alice.post(f"webhooks/{hook['id']}/test", status=202)
    for _ in range(webhooks.MAX_ATTEMPTS + 2):
        make_due()
        deliver_webhooks()
    (delivery,) = deliveries(alice, hook)
    assert (delivery["state"], delivery["num_attempts"]) == ("given_up", webhooks.MAX_ATTEMPTS)
    assert delivery["next_attempt_at"] is None
    assert len(receiver.told) == webhooks.MAX_ATTEMPTS


def test_a_redirect_is_no_delivery_and_not_followed(alice: Rest, receiver: Receiver) -> None:
    receiver.statuses, receiver.location = [302], "http://127.0.0.1:1/metadata"
    hook = watch(alice, receiver.url, "run.failed")
    alice.post(f"webhooks/{hook['id']}/test", status=202)
    deliver_webhooks()
    (delivery,) = deliveries(alice, hook)
    assert (delivery["state"], delivery["last_answer"][:3]) == ("pending", "302")


def test_an_address_that_does_not_answer_is_told_later(alice: Rest, receiver: Receiver) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hook = watch(alice, f"http://127.0.0.1:{closed.getsockname()[1]}/", "run.failed")
        alice.post(f"webhooks/{hook['id']}/test", status=202)
        good = watch(alice, receiver.url, "run.failed")
        alice.post(f"webhooks/{good['id']}/test", status=202)
        deliver_webhooks()
    (delivery,) = deliveries(alice, hook)
    assert delivery["state"] == "pending"
    assert "ConnectError" in delivery["last_answer"]
    assert deliveries(alice, good)[0]["state"] == "delivered"


@pytest.mark.parametrize("url", ["http://a..b/x", f"http://{'a' * 64}.org/", "http://xn--/"])
def test_an_address_that_cannot_even_be_looked_up_costs_its_neighbours_nothing(
    alice: Rest, receiver: Receiver, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    hooks = [watch(alice, receiver.url, "run.failed") for _ in range(3)]
    Webhook.objects.filter(public_id=hooks[1]["id"]).update(url=url)
    for hook in hooks:
        alice.post(f"webhooks/{hook['id']}/test", status=202)
    deliver_webhooks()
    make_due()
    deliver_webhooks()
    assert len(receiver.told) == 2
    (bad,) = deliveries(alice, hooks[1])
    assert (bad["state"], bad["num_attempts"]) == ("pending", 2)
    assert "label" in bad["last_answer"]
    for hook in (hooks[0], hooks[2]):
        assert [one["state"] for one in deliveries(alice, hook)] == ["delivered"]
    assert "a message could not be sent" in caplog.text


def test_an_address_that_is_switched_off_is_told_nothing(
    alice: Rest, receiver: Receiver, recipe: Recipe
) -> None:
    hook = watch(alice, receiver.url, "run.failed")
    alice.done("PATCH", f"webhooks/{hook['id']}", {"is_active": False})
    recipe_steps.fail(recipe, "out of memory")
    deliver_webhooks()
    assert receiver.told == []
    assert deliveries(alice, hook) == []


def test_old_messages_are_forgotten(alice: Rest, receiver: Receiver) -> None:
    hook = watch(alice, receiver.url, "run.failed")
    for _ in range(2):
        alice.post(f"webhooks/{hook['id']}/test", status=202)
    newest = WebhookDelivery.objects.latest("pk")
    WebhookDelivery.objects.exclude(pk=newest.pk).update(created_at=timezone.now() - timedelta(days=31))
    housekeeping()
    assert [one["id"] for one in deliveries(alice, hook)] == [f"whd-{newest.pk}"]
