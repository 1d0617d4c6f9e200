"""Rows: the truth about people, runs, operations and what they made. Written by `runs.services` alone."""

from runs.models.accounts import ApiKey, LoginLink, Session, User
from runs.models.checkpoints import Checkpoint, SamplingSession, Snapshot
from runs.models.operations import Operation
from runs.models.training_runs import Metric, RunEvent, TrainingRun
from runs.models.workers import BaseModel, Worker

__all__ = [
    "ApiKey",
    "BaseModel",
    "Checkpoint",
    "LoginLink",
    "Metric",
    "Operation",
    "RunEvent",
    "SamplingSession",
    "Session",
    "Snapshot",
    "TrainingRun",
    "User",
    "Worker",
]
