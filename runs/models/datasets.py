"""Datasets people uploaded, their versions by content, and uploads that are still on their way."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now

from runs.models.accounts import User


class Dataset(models.Model):
    """A named dataset; its contents are its versions."""

    public_id = models.CharField(max_length=40, unique=True)
    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="datasets")
    name = models.CharField(max_length=200)
    description = models.TextField(blank=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["-created_at", "-id"]

    def __str__(self) -> str:
        return self.public_id


class DatasetVersion(models.Model):
    """One content of a dataset: the uploaded file, what the doctor found, and the rows made from it.

    `directory` is a storage folder built from an id: `original` is the file as uploaded, `rows.jsonl` one
    canonical example a line, `rows.idx` the byte offset of each line (little-endian uint64, one more than
    rows). The last two exist once the version is ready; `bad.jsonl` holds the refused rows, if there are any.
    `mapping`, `encoding` and `skip_bad_rows` are what the person chose; empty means "as the doctor thinks".
    """

    class State(models.TextChoices):
        """`checking` ends in one of the others; a choice of the person leads from those back to it."""

        CHECKING = "checking"
        READY = "ready"
        NEEDS_MAPPING = "needs_mapping", "needs a column mapping"
        NEEDS_CHOICE = "needs_choice", "has bad rows"
        FAILED = "failed"

    class Kind(models.TextChoices):
        """What a canonical row holds."""

        CHAT = "chat"
        COMPLETION = "completion", "prompt and completion"
        TEXT = "text", "raw text"
        PREFERENCE = "preference", "preference pairs"
        PROMPTS = "prompts", "prompts with a reference answer"

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="versions")
    number = models.PositiveIntegerField()
    digest = models.CharField(max_length=64)
    filename = models.CharField(max_length=255)
    size_bytes = models.PositiveBigIntegerField()
    directory = models.CharField(max_length=200)
    state = models.CharField(max_length=20, choices=State.choices, default=State.CHECKING)
    error = models.TextField(blank=True)
    kind = models.CharField(max_length=20, choices=Kind.choices, blank=True)
    mapping = models.JSONField(default=dict)
    encoding = models.CharField(max_length=40, blank=True)
    skip_bad_rows = models.BooleanField(default=False)
    num_rows = models.PositiveBigIntegerField(default=0)
    num_bad_rows = models.PositiveBigIntegerField(default=0)
    report = models.JSONField(default=dict)
    progress = models.FloatField(default=0.0)
    checked_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["-number"]
        constraints = [
            models.UniqueConstraint(fields=["dataset", "number"], name="dataset_version_once"),
            models.UniqueConstraint(fields=["dataset", "digest"], name="dataset_content_once"),
        ]

    def __str__(self) -> str:
        return f"{self.dataset_id}@{self.number}"


class Upload(models.Model):
    """A file on its way in, by the tus protocol; how much of it is there is the size of its file on disk."""

    public_id = models.CharField(max_length=40, unique=True)
    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="uploads")
    dataset = models.ForeignKey(Dataset, null=True, on_delete=models.CASCADE, related_name="uploads")
    filename = models.CharField(max_length=255)
    size_bytes = models.PositiveBigIntegerField()
    metadata = models.JSONField(default=dict)
    version = models.ForeignKey(DatasetVersion, null=True, on_delete=models.SET_NULL)
    created_at = models.DateTimeField(db_default=Now())
    expires_at = models.DateTimeField()

    def __str__(self) -> str:
        return self.public_id
