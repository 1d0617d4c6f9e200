"""Webhooks: addresses that are told when a run ends or a metric crosses a threshold."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, cast

from django.db import transaction
from django.http import HttpRequest
from ninja import Router, Status
from pydantic import BaseModel, Field, StringConstraints, model_validator

from runs.models import Webhook, WebhookDelivery
from runs.rest.bodies import JsonBody
from runs.rest.boundary import caller, check_match
from runs.rest.metrics import MetricName
from runs.rest.paging import Cursor, Limit, Page, page_of
from runs.rest.runs import RequestModel
from runs.schemas.parsing import validate_object
from runs.services import access, webhooks

router = Router(tags=["webhooks"])

EventName = Literal["run.finished", "run.failed", "run.stopped", "metric.threshold"]
Events = Annotated[list[EventName], Field(min_length=1, max_length=4)]
Address = Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=r"^https?://[!-~]+$")]


class Threshold(RequestModel):
    """A metric and the value it is not to pass, above or below."""

    metric: MetricName
    above: float | None = None
    below: float | None = None

    @model_validator(mode="after")
    def _has_one_side(self) -> Threshold:
        if (self.above is None) == (self.below is None):
            raise ValueError("give above or below")
        return self


class NewWebhook(RequestModel):
    """Where to send what."""

    url: Address
    events: Events
    threshold: Threshold | None = Field(default=None, description="For metric.threshold.")

    @model_validator(mode="after")
    def _has_its_threshold(self) -> NewWebhook:
        if (self.threshold is not None) != ("metric.threshold" in self.events):
            raise ValueError("metric.threshold and a threshold go together")
        return self


class ChangeWebhook(RequestModel):
    """What to change; what is left out stays."""

    url: Address | None = None
    events: Events | None = None
    threshold: Threshold | None = None
    is_active: bool | None = None


class WebhookOut(BaseModel):
    """An address."""

    id: str
    url: str
    events: list[EventName]
    threshold: Threshold | None
    is_active: bool
    created_at: datetime


class NewWebhookOut(WebhookOut):
    """An address with the secret that signs what it is sent; told this one time."""

    secret: str


class DeliveryOut(BaseModel):
    """One message. It is tried up to 12 times over some hours until a 2xx comes back."""

    id: str = Field(description="Sent as Mintweb-Delivery; the same for every attempt.")
    event: str
    run_id: str | None
    payload: dict[str, Any]
    state: Literal["pending", "delivered", "given_up"]
    num_attempts: int
    last_answer: str
    next_attempt_at: datetime | None
    delivered_at: datetime | None
    created_at: datetime


@router.get("", response=Page[WebhookOut], summary="List webhooks")
def list_webhooks(request: HttpRequest, limit: Limit = 50, cursor: Cursor = None) -> Page[WebhookOut]:
    """Return the webhooks, newest first."""
    rows = access.webhooks_of(caller(request))
    return page_of(rows, _shown, sort="-id", cursor=cursor, limit=limit, scope="webhooks")


@router.post("", response={201: NewWebhookOut}, summary="Create a webhook")
def create_webhook(request: HttpRequest, body: Annotated[NewWebhook, JsonBody(...)]) -> Status[NewWebhookOut]:
    """Have an address told of events.

    Each message is a POST of JSON, signed: the header `Mintweb-Signature: t=SECONDS,v1=HEX` holds the
    HMAC-SHA256, keyed with the secret, of SECONDS, a full stop and the body. An address inside the
    server's own network is refused unless the setting MINTWEB_WEBHOOK_HOSTS names its host.
    """
    made = webhooks.create(
        caller(request), url=body.url, wanted=sorted(set(body.events)), threshold=_stored(body.threshold)
    )
    return Status(201, NewWebhookOut(**_shown(made).model_dump(), secret=made.secret))


@router.get("/{webhook_id}", response=WebhookOut, summary="Read a webhook")
def get_webhook(request: HttpRequest, webhook_id: str) -> WebhookOut:
    """Return one webhook."""
    return _shown(access.get_webhook(caller(request), webhook_id))


@router.patch("/{webhook_id}", response=WebhookOut, summary="Change a webhook")
def change_webhook(
    request: HttpRequest, webhook_id: str, body: Annotated[ChangeWebhook, JsonBody(...)]
) -> WebhookOut:
    """Change a webhook, or switch it off and on."""
    given: dict[str, Any] = body.model_dump(exclude_unset=True, exclude_none=True)
    if body.events is not None:
        given["events"] = sorted(set(body.events))
    if "threshold" in body.model_fields_set:
        given["threshold"] = _stored(body.threshold)
    with transaction.atomic():
        access.lock(access.get_webhook(caller(request), webhook_id))
        webhook = access.get_webhook(caller(request), webhook_id)
        check_match(request, _shown(webhook))
        validate_object(NewWebhook, _merged(webhook, given))
        webhooks.change(webhook, **given)
    return _shown(access.get_webhook(caller(request), webhook_id))


@router.delete("/{webhook_id}", response={204: None}, summary="Delete a webhook")
def delete_webhook(request: HttpRequest, webhook_id: str) -> Status[None]:
    """Delete a webhook with its deliveries."""
    webhooks.delete(access.get_webhook(caller(request), webhook_id))
    return Status(204, None)


@router.get("/{webhook_id}/deliveries", response=Page[DeliveryOut], summary="List deliveries")
def list_deliveries(
    request: HttpRequest, webhook_id: str, limit: Limit = 50, cursor: Cursor = None
) -> Page[DeliveryOut]:
    """Return what the address was told in the last 30 days, newest first."""
    rows = webhooks.deliveries_of(access.get_webhook(caller(request), webhook_id))
    return page_of(rows, _delivery, sort="-id", cursor=cursor, limit=limit, scope=f"deliveries {webhook_id}")


@router.post("/{webhook_id}/test", response={202: DeliveryOut}, summary="Send a test")
def test_webhook(request: HttpRequest, webhook_id: str) -> Status[DeliveryOut]:
    """Send the address a message of the event `test`."""
    return Status(202, _delivery(webhooks.send_test(access.get_webhook(caller(request), webhook_id))))


def _merged(webhook: Webhook, given: dict[str, Any]) -> dict[str, Any]:
    held = {"url": webhook.url, "events": webhook.events, "threshold": webhook.threshold or None}
    asked = {name: value or None for name, value in given.items() if name != "is_active"}
    return {**held, **asked}


def _stored(threshold: Threshold | None) -> dict[str, Any]:
    return {} if threshold is None else threshold.model_dump(exclude_none=True)


def _shown(row: Webhook) -> WebhookOut:
    return WebhookOut(
        id=row.public_id,
        url=row.url,
        events=cast(list[EventName], row.events),
        threshold=Threshold(**row.threshold) if row.threshold else None,
        is_active=row.is_active,
        created_at=row.created_at,
    )


def _delivery(row: WebhookDelivery) -> DeliveryOut:
    is_open = row.delivered_at is None and row.given_up_at is None
    state: Literal["pending", "delivered", "given_up"] = "given_up" if row.given_up_at else "pending"
    return DeliveryOut(
        id=webhooks.delivery_id(row),
        event=row.event,
        run_id=row.run.public_id if row.run is not None else None,
        payload=webhooks.payload_of(row),
        state="delivered" if row.delivered_at else state,
        num_attempts=row.num_attempts,
        last_answer=row.last_answer,
        next_attempt_at=row.next_attempt_at if is_open else None,
        delivered_at=row.delivered_at,
        created_at=row.created_at,
    )
