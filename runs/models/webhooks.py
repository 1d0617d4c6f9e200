"""Addresses that are told when something happens to a run, and each telling."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now

from runs.models.accounts import User
from runs.models.training_runs import TrainingRun


class Webhook(models.Model):
    """An address of the user's. `secret` signs what is sent, so it is kept in the clear."""

    public_id = models.CharField(max_length=40, unique=True)
    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="webhooks")
    url = models.CharField(max_length=2000)
    secret = models.CharField(max_length=100)
    events = models.JSONField(default=list)
    threshold = models.JSONField(default=dict)
    is_active = models.BooleanField(default=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["-created_at", "-id"]

    def __str__(self) -> str:
        return self.public_id


class WebhookDelivery(models.Model):
    """One message to one address; unique, so that an event is told once however often it is noticed."""

    webhook = models.ForeignKey(Webhook, on_delete=models.CASCADE, related_name="deliveries")
    run = models.ForeignKey(TrainingRun, null=True, on_delete=models.CASCADE)
    event = models.CharField(max_length=40)
    key = models.CharField(max_length=200)
    payload = models.JSONField()
    num_attempts = models.PositiveIntegerField(default=0)
    next_attempt_at = models.DateTimeField(db_default=Now())
    delivered_at = models.DateTimeField(null=True)
    given_up_at = models.DateTimeField(null=True)
    last_answer = models.TextField(blank=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["-id"]
        constraints = [models.UniqueConstraint(fields=["webhook", "key"], name="delivery_once")]
        indexes = [
            models.Index(
                fields=["next_attempt_at"],
                condition=models.Q(delivered_at=None, given_up_at=None),
                name="delivery_due",
            )
        ]

    def __str__(self) -> str:
        return self.key


class IdempotentReply(models.Model):
    """What a request with an Idempotency-Key was answered, for a day."""

    owner = models.ForeignKey(User, on_delete=models.CASCADE)
    key = models.CharField(max_length=255)
    request_digest = models.CharField(max_length=64)
    status = models.PositiveIntegerField(null=True)
    body = models.BinaryField(null=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [models.UniqueConstraint(fields=["owner", "key"], name="idempotency_key_once")]

    def __str__(self) -> str:
        return self.key
