"""Rows: the truth about people, runs, operations and what they made. Written by `runs.services` alone."""

from runs.models.accounts import ApiKey, LoginLink, ServerClock, Session, SignInTries, User
from runs.models.checkpoints import Checkpoint, SamplingSession, Snapshot
from runs.models.datasets import Dataset, DatasetVersion, Upload
from runs.models.deletions import PendingDeletion
from runs.models.operations import Operation
from runs.models.recipes import Evaluation, FixedSample, Recipe
from runs.models.tallies import CatalogTally
from runs.models.training_runs import Metric, RunEvent, TrainingRun
from runs.models.webhooks import IdempotentReply, Webhook, WebhookDelivery
from runs.models.workers import BaseModel, Worker

__all__ = [
    "ApiKey",
    "BaseModel",
    "CatalogTally",
    "Checkpoint",
    "Dataset",
    "DatasetVersion",
    "Evaluation",
    "FixedSample",
    "IdempotentReply",
    "LoginLink",
    "Metric",
    "Operation",
    "PendingDeletion",
    "Recipe",
    "RunEvent",
    "SamplingSession",
    "ServerClock",
    "Session",
    "SignInTries",
    "Snapshot",
    "TrainingRun",
    "Upload",
    "User",
    "Webhook",
    "WebhookDelivery",
    "Worker",
]
