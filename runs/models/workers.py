"""GPU workers and the base models they hold."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now


class Worker(models.Model):
    """One GPU worker process. Alive while its advisory lock is held and its lease has not run out.

    `lease_until` is set and compared with the database's clock only. A run belongs to the worker
    its row names; who finds that worker dead may take the run by raising its fence. `fingerprint` says
    what it computes with, for each base model it has loaded. `drain_asked_at` is when an operator had it take
    nothing new and let go of what it holds. `samplers` says in words who draws its samples, for each base model
    with a server for that.
    """

    host = models.CharField(max_length=200)
    pid = models.PositiveIntegerField()
    device = models.CharField(max_length=40, blank=True)
    dtype = models.CharField(max_length=20, blank=True)
    memory_bytes = models.PositiveBigIntegerField(default=0)
    fingerprint = models.JSONField(default=dict, db_default={})
    started_at = models.DateTimeField(db_default=Now())
    lease_until = models.DateTimeField()
    stopped_at = models.DateTimeField(null=True)
    busy_share = models.FloatField(null=True)
    drain_asked_at = models.DateTimeField(null=True)
    samplers = models.JSONField(default=dict, db_default={})

    class Meta:
        ordering = ["-started_at"]
        indexes = [
            models.Index(fields=["lease_until"], condition=models.Q(stopped_at=None), name="worker_live")
        ]

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


class BaseModel(models.Model):
    """A base model as the worker that loaded it last (or failed to) reported it."""

    name = models.CharField(max_length=200, unique=True)
    directory = models.CharField(max_length=1000, blank=True)
    worker = models.ForeignKey(Worker, null=True, on_delete=models.SET_NULL)
    error = models.TextField(blank=True)
    architecture = models.CharField(max_length=100, blank=True)
    precision = models.CharField(max_length=300, blank=True, db_default="")
    vocab_size = models.PositiveIntegerField(default=0)
    max_context = models.PositiveIntegerField(default=0)
    max_rank = models.PositiveIntegerField(default=0)
    num_parameters = models.PositiveBigIntegerField(default=0)
    sizes = models.JSONField(default=dict)
    reported_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name
