"""Who may do what: users, their API keys and login links, and the sessions their SDK clients open."""

from __future__ import annotations

from django.contrib.auth.models import AbstractUser
from django.db import models
from django.db.models.functions import Now


class User(AbstractUser):
    """A person; owns runs, checkpoints and keys."""


class ApiKey(models.Model):
    """An API key: only a keyed hash of the secret is kept, and its first characters to tell keys apart."""

    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=100)
    prefix = models.CharField(max_length=16)
    secret_hash = models.CharField(max_length=64, unique=True)
    created_at = models.DateTimeField(db_default=Now())
    last_used_at = models.DateTimeField(null=True)
    revoked_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"{self.prefix}... ({self.name})"


class LoginLink(models.Model):
    """A link that signs its user in once, before it expires."""

    user = models.ForeignKey(User, on_delete=models.CASCADE)
    token_hash = models.CharField(max_length=64, unique=True)
    created_at = models.DateTimeField(db_default=Now())
    expires_at = models.DateTimeField()
    used_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"login link of {self.user_id}"


class SignInTries(models.Model):
    """How often somebody has tried to sign in lately, by a digest of whom from where; see `services/lockout.py`."""

    key = models.CharField(max_length=64, primary_key=True)
    num_tries = models.PositiveIntegerField()
    until = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.num_tries} tries"


class ServerClock(models.Model):
    """One row: how long this server was up to hear its clients, in seconds; outages do not count."""

    uptime_s = models.FloatField(default=0.0)
    seen_at = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        return f"{self.uptime_s:.0f} s"


class Session(models.Model):
    """One SDK client process; its public id is the first part of the ids of everything it makes.

    `heard_uptime_s` is the server's clock at the last heartbeat.
    """

    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="sdk_sessions")
    public_id = models.CharField(max_length=64, unique=True)
    tags = models.JSONField(default=list)
    user_metadata = models.JSONField(default=dict)
    display_name = models.CharField(max_length=200, blank=True)
    sdk_version = models.CharField(max_length=40, blank=True)
    created_at = models.DateTimeField(db_default=Now())
    last_heartbeat_at = models.DateTimeField(db_default=Now())
    heard_uptime_s = models.FloatField(default=0.0, db_default=0.0)
    finished_at = models.DateTimeField(null=True)
    finish_reason = models.CharField(max_length=20, blank=True)

    def __str__(self) -> str:
        return self.public_id
