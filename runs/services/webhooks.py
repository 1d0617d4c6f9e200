"""Addresses that are told what happens to runs: kept, told once per event, tried again until they answer."""

from __future__ import annotations

import json
import math
import secrets
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final

from django.db import connection, transaction
from django.db.models import F, QuerySet, Window
from django.db.models.functions import Now, RowNumber
from pydantic_core import to_json

from runs import events
from runs.exceptions import RateLimited, RequestInvalid
from runs.models import Recipe, TrainingRun, User, Webhook, WebhookDelivery
from runs.services import sessions, webhook_sender
from runs.services.advisory_locks import LockClass, any_lock
from runs.services.webhook_sender import Message, Outcome

FINISHED: Final = "run.finished"
FAILED: Final = "run.failed"
STOPPED: Final = "run.stopped"
THRESHOLD: Final = "metric.threshold"
EVENTS: Final = (FINISHED, FAILED, STOPPED, THRESHOLD)
TEST: Final = "test"
MAX_PER_USER: Final = 20
MAX_PENDING: Final = 20
MAX_ATTEMPTS: Final = 12
_FIRST_DELAY_S: Final = 10
_LONGEST_DELAY_S: Final = 6 * 3600
_BATCH: Final = 16
_SLICE_S: Final = 20.0
# While a message is on its way nobody else sends it; longer than the longest exchange.
_CLAIM: Final = timedelta(seconds=60)
_KEPT: Final = timedelta(days=30)
_CACHE_S: Final = 10.0
# The subquery locks the address, so that one that is deleted meanwhile breaks nothing.
_ENQUEUE: Final = """
INSERT INTO runs_webhookdelivery (webhook_id, run_id, event, key, payload, num_attempts, last_answer)
SELECT hook.id, %s, %s, %s, %s::jsonb, 0, ''
FROM (SELECT id FROM runs_webhook WHERE id = %s AND is_active FOR KEY SHARE) AS hook
ON CONFLICT DO NOTHING RETURNING id
"""


@dataclass(frozen=True, kw_only=True)
class _Watch:
    """A threshold that somebody wants to hear of."""

    webhook_pk: int
    metric: str
    above: float | None
    below: float | None

    @property
    def words(self) -> str:
        side, bound = ("above", self.above) if self.above is not None else ("below", self.below)
        return f"{self.metric} {side} {bound!r}"

    def is_crossed(self, value: float) -> bool:
        return (self.above is not None and value > self.above) or (
            self.below is not None and value < self.below
        )


def create(user: User, *, url: str, wanted: Sequence[str], threshold: Mapping[str, Any]) -> Webhook:
    """Keep an address with a fresh secret.

    Raises:
        RequestInvalid: the address may not be told, or the user has too many.
    """
    webhook_sender.check_url(url)
    if Webhook.objects.filter(owner=user).count() >= MAX_PER_USER:
        raise RequestInvalid(f"there are {MAX_PER_USER} webhooks already, the most a user may have")
    made = Webhook.objects.create(
        public_id=f"wh-{uuid.uuid4().hex[:12]}",
        owner=user,
        url=url,
        secret=f"whsec_{secrets.token_urlsafe(32)}",
        events=list(wanted),
        threshold=dict(threshold),
    )
    made.refresh_from_db()
    return made


def change(webhook: Webhook, **values: Any) -> None:
    """Change the url, events, threshold or is_active of an address."""
    if "url" in values:
        webhook_sender.check_url(values["url"])
    Webhook.objects.filter(pk=webhook.pk).update(**values)


def delete(webhook: Webhook) -> None:
    """Forget an address and what it was told."""
    Webhook.objects.filter(pk=webhook.pk).delete()


def deliveries_of(webhook: Webhook) -> QuerySet[WebhookDelivery]:
    """Return what an address was told, or will be."""
    return WebhookDelivery.objects.filter(webhook=webhook).select_related("run")


def send_test(webhook: Webhook) -> WebhookDelivery:
    """Tell an address that this is a test; also one that is not active gets it.

    Raises:
        RateLimited: what the address was to be told before still waits.
    """
    with transaction.atomic():
        Webhook.objects.select_for_update(no_key=True).get(pk=webhook.pk)  # or two would be the last one
        if deliveries_of(webhook).filter(delivered_at=None, given_up_at=None).count() >= MAX_PENDING:
            raise RateLimited(
                f"{MAX_PENDING} messages to this address wait already, the most there may be for a test"
            )
        made = WebhookDelivery.objects.create(
            webhook=webhook, event=TEST, key=f"test:{uuid.uuid4().hex}", payload={"event": TEST}
        )
        events.ring_webhooks()
    made.refresh_from_db()
    return made


def run_ended(run: TrainingRun, event: str, *, error: str = "") -> None:
    """Tell who wants to know that a run finished, failed or was stopped; a run that goes on can end again."""
    hooks = Webhook.objects.filter(owner_id=run.owner_id, is_active=True, events__contains=event)
    for webhook_pk in hooks.values_list("pk", flat=True):
        # Going on puts a run into the queue again, so this tells its ends apart.
        queued_at = Recipe.objects.filter(run=run).values_list("queued_at", flat=True).first()
        turn = queued_at.isoformat() if queued_at is not None else "once"
        if _enqueue(webhook_pk, run, event, f"{event}:{run.public_id}:{turn}", {}, error=error):
            events.ring_webhooks()


def client_ended(run_pk: int) -> None:
    """Tell who wants to know that a run whose client trains it was closed, by it or after it, or could not be made."""
    run = TrainingRun.objects.select_related("session").get(pk=run_pk)
    if Recipe.objects.filter(run=run).exists():
        return
    reason = run.session.finish_reason
    if run.state == TrainingRun.State.FAILED:
        run_ended(run, FAILED)
    elif reason in ("", sessions.SUCCESS):
        run_ended(run, FINISHED)
    else:
        run_ended(run, STOPPED, error=f"its client closed the session as {reason}")


def note_values(run_pk: int, owner_pk: int, values: Iterable[tuple[str, int, float]]) -> None:
    """Tell who wants to know that a metric crossed a threshold; call it in the transaction that enters them.

    Costs a look into a dict for who has no thresholds. Each threshold is told once per run.
    """
    watches = _watches.of(owner_pk)
    if not watches:
        return
    for name, step, value in values:
        for watch in watches:
            if watch.metric == name and watch.is_crossed(value) and not _watches.was_told(watch, run_pk):
                run = TrainingRun.objects.get(pk=run_pk)
                shown = value if math.isfinite(value) else None
                content = {"metric": {"name": name, "step": step, "value": shown, "threshold": watch.words}}
                key = f"{THRESHOLD}:{run.public_id}:{watch.words}"[:200]
                _enqueue(watch.webhook_pk, run, THRESHOLD, key, content)
                transaction.on_commit(partial(_watches.note_told, watch, run_pk))


def deliver_due() -> int:
    """Send what is due, for some seconds; returns how many messages were tried.

    One process at a time does: addresses that do not answer hold up one process and not all of them.
    """
    with any_lock(LockClass.WEBHOOKS, [0]) as is_mine:
        return _deliver() if is_mine else 0


def forget_old() -> None:
    """Delete what was told, or given up, long ago."""
    WebhookDelivery.objects.filter(created_at__lte=Now() - _KEPT).delete()


def payload_of(row: WebhookDelivery) -> dict[str, Any]:
    """Return what an address is told."""
    return {"id": delivery_id(row), "created_at": row.created_at, **row.payload}


def delivery_id(row: WebhookDelivery) -> str:
    """Return the public id of a delivery."""
    return f"whd-{row.pk}"


def _deliver() -> int:
    num_tried = 0
    until = time.monotonic() + _SLICE_S
    while time.monotonic() < until:
        claimed = _claim()
        if not claimed:
            break
        outcomes = webhook_sender.send_all([_message(row) for row in claimed])
        for row, outcome in zip(claimed, outcomes, strict=True):
            _enter(row, outcome)
        num_tried += len(claimed)
    return num_tried


def _enqueue(
    webhook_pk: int, run: TrainingRun, event: str, key: str, content: Mapping[str, Any], *, error: str = ""
) -> bool:
    shown = TrainingRun.objects.filter(pk=run.pk).values("name", "base_model", "step", "loss").get()
    loss = shown["loss"] if shown["loss"] is not None and math.isfinite(shown["loss"]) else None
    payload = {
        "event": event,
        "run": {"id": run.public_id, **shown, "loss": loss, "error": error or run.error},
        **content,
    }
    with connection.cursor() as cursor:
        cursor.execute(_ENQUEUE, [run.pk, event, key, json.dumps(payload, allow_nan=False), webhook_pk])
        return cursor.fetchone() is not None


def _claim() -> list[WebhookDelivery]:
    """Take what is sent next: the oldest of each owner, then the next of each, so that many wait behind nobody's many."""
    due = WebhookDelivery.objects.filter(
        delivered_at=None, given_up_at=None, next_attempt_at__lte=Now()
    ).exclude(webhook__is_active=False, event__in=EVENTS)
    turn = Window(RowNumber(), partition_by=F("webhook__owner_id"), order_by="next_attempt_at")
    by_turns = due.annotate(turn=turn).order_by("turn", "next_attempt_at")
    with transaction.atomic():
        rows = due.filter(pk__in=list(by_turns.values_list("pk", flat=True)[:_BATCH]))
        claimed = list(rows.select_for_update(skip_locked=True, of=("self",)).select_related("webhook"))
        WebhookDelivery.objects.filter(pk__in=[row.pk for row in claimed]).update(
            num_attempts=F("num_attempts") + 1, next_attempt_at=Now() + _CLAIM
        )
    for row in claimed:
        row.num_attempts += 1
    return claimed


def _message(row: WebhookDelivery) -> Message:
    return Message(
        url=row.webhook.url,
        secret=row.webhook.secret,
        event=row.event,
        delivery_id=delivery_id(row),
        body=to_json(payload_of(row), inf_nan_mode="null"),
    )


def _enter(row: WebhookDelivery, outcome: Outcome) -> None:
    values: dict[str, Any] = {"last_answer": outcome.answer.replace("\0", "")}
    if outcome.is_delivered:
        values["delivered_at"] = Now()
    elif row.num_attempts >= MAX_ATTEMPTS:
        values["given_up_at"] = Now()
    else:
        delay_s = min(_FIRST_DELAY_S * 2 ** (row.num_attempts - 1), _LONGEST_DELAY_S)
        values["next_attempt_at"] = Now() + timedelta(seconds=delay_s)
    WebhookDelivery.objects.filter(pk=row.pk, delivered_at=None).update(**values)


class _Watches:
    """The thresholds of each user for some seconds, and which were told of which run by this process."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[float, list[_Watch]]] = {}
        self._told: set[tuple[_Watch, int]] = set()

    def of(self, owner_pk: int) -> list[_Watch]:
        held = self._held.get(owner_pk)
        if held is None or held[0] < time.monotonic():
            rows = Webhook.objects.filter(owner_id=owner_pk, is_active=True, events__contains=THRESHOLD)
            held = (time.monotonic() + _CACHE_S, [_watch(row) for row in rows if row.threshold])
            self._held[owner_pk] = held
        return held[1]

    def was_told(self, watch: _Watch, run_pk: int) -> bool:
        return (watch, run_pk) in self._told

    def note_told(self, watch: _Watch, run_pk: int) -> None:
        if len(self._told) > 100_000:
            self._told.clear()
        self._told.add((watch, run_pk))


def _watch(row: Webhook) -> _Watch:
    return _Watch(
        webhook_pk=row.pk,
        metric=row.threshold["metric"],
        above=row.threshold.get("above"),
        below=row.threshold.get("below"),
    )


_watches = _Watches()
