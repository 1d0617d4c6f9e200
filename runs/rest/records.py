"""What a run tells of itself: events, evaluations, the answers to its fixed prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Literal

from django.http import HttpRequest
from ninja import Router
from pydantic import BaseModel, Field

from runs.models import Evaluation, FixedSample, Operation, RunEvent
from runs.recipes.rendering import decoder_of
from runs.rest.boundary import caller
from runs.rest.paging import Cursor, Limit, Page, page_of
from runs.rest.rendering import Number
from runs.schemas.results import decode_sample
from runs.services import access, recipe_status

router = Router(tags=["metrics"])


class Event(BaseModel):
    """Something that happened to the run."""

    id: int
    kind: str
    step: int
    detail: dict[str, Any]
    created_at: datetime


class Measured(BaseModel):
    """The validation loss of one dataset after a step; null until it is measured or when it is not finite."""

    step: int
    label: str
    loss: Number
    num_tokens: int
    has_checkpoint: bool = Field(
        description="Whether a training checkpoint of this step is there now: saved already, and not deleted."
    )


class Sampled(BaseModel):
    """One of the fixed prompts, answered after a step; without a step by the bare base model."""

    step: int | None
    prompt: str
    state: Literal["pending", "done", "failed"]
    text: str
    stop_reason: str
    num_tokens: int
    error: str


@router.get("/{run_id}/events", response=Page[Event], summary="Events")
def list_events(request: HttpRequest, run_id: str, limit: Limit = 50, cursor: Cursor = None) -> Page[Event]:
    """Return what happened to the run, in order."""
    rows = RunEvent.objects.filter(run=access.get_run(caller(request), run_id))
    return page_of(rows, _event, sort="id", cursor=cursor, limit=limit, scope=f"events {run_id}")


@router.get("/{run_id}/evaluations", response=Page[Measured], summary="Evaluations")
def list_evaluations(
    request: HttpRequest, run_id: str, limit: Limit = 50, cursor: Cursor = None
) -> Page[Measured]:
    """Return the run's validation losses, in order of step."""
    rows = recipe_status.evaluations_of(access.get_run(caller(request), run_id))
    return page_of(rows, _measured, sort="step", cursor=cursor, limit=limit, scope=f"evaluations {run_id}")


@router.get("/{run_id}/samples", response=Page[Sampled], summary="Answers to the fixed prompts")
def list_run_samples(
    request: HttpRequest, run_id: str, limit: Limit = 50, cursor: Cursor = None
) -> Page[Sampled]:
    """Return how the run answers its fixed prompts as it trains, in the order they were asked."""
    run = access.get_run(caller(request), run_id)
    rows = recipe_status.fixed_samples_of(run).defer("operation__payload")
    decode = decoder_of(run.base_model)
    return page_of(
        rows,
        lambda row: _sampled(row, decode),
        sort="id",
        cursor=cursor,
        limit=limit,
        scope=f"samples {run_id}",
    )


def _event(row: RunEvent) -> Event:
    return Event(id=row.pk, kind=row.kind, step=row.step, detail=row.detail, created_at=row.created_at)


def _measured(row: Evaluation) -> Measured:
    return Measured(
        step=row.step,
        label=row.label,
        loss=row.loss,
        num_tokens=row.num_tokens,
        has_checkpoint=row.is_saved,  # type: ignore[attr-defined]
    )


def _sampled(row: FixedSample, decode: Callable[[Sequence[int]], str]) -> Sampled:
    operation = row.operation
    shown: dict[str, Any] = {"state": "pending", "text": "", "stop_reason": "", "num_tokens": 0, "error": ""}
    error = row.error or (operation.error if operation is not None else "")
    if error:
        shown |= {"state": "failed", "error": error}
    elif operation is not None and operation.state == Operation.State.DONE and operation.result:
        first = decode_sample(bytes(operation.result)).sequences[0]
        tokens = first.tokens.tolist()
        shown |= {
            "state": "done",
            "text": decode(tokens),
            "stop_reason": first.stop_reason,
            "num_tokens": len(tokens),
        }
    return Sampled(step=row.step, prompt=row.prompt, **shown)
