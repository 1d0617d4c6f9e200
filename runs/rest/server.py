"""The server: its GPU workers, which an operator may drain, and the base models they hold."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from django.http import HttpRequest
from ninja import Router
from pydantic import BaseModel, Field

from runs.models import Worker
from runs.rest.boundary import caller, operators_only
from runs.rest.rendering import Number
from runs.services import access, base_models, workers
from runs.services.workers import WorkerState

router = Router(tags=["server"])

_MAX_WORKERS = 100
WorkerNumber = Annotated[int, Field(ge=1, le=2**62)]


class WorkerOut(BaseModel):
    """A GPU worker, alive or ended."""

    id: int
    state: WorkerState = Field(
        description="`draining` until it has let go of what it holds, then `drained`: it takes nothing new."
    )
    host: str
    device: str
    dtype: str
    is_alive: bool
    num_runs: int = Field(description="How many runs it holds.")
    num_samples: int = Field(description="How many samples it draws.")
    busy_share: Number = Field(description="How much of the time the device computes, 0 to 1.")
    samplers: dict[str, str] = Field(
        description="Who draws the samples while it lives, in words, for each base model that vLLM samples from; "
        "the worker itself draws those of the others."
    )
    started_at: datetime
    drain_asked_at: datetime | None
    stopped_at: datetime | None


class Workers(BaseModel):
    """The live workers, then those that ended last; at most 100."""

    items: list[WorkerOut]


class BaseModelOut(BaseModel):
    """A base model; the sizes are null until a worker has loaded it."""

    name: str
    is_loaded: bool
    error: str
    architecture: str
    num_parameters: int | None
    vocab_size: int | None
    max_context: int | None
    max_rank: int | None


class BaseModels(BaseModel):
    """The base models on offer, in the order of the settings."""

    items: list[BaseModelOut]


@router.get("/workers", response=Workers, summary="List workers")
def list_workers(request: HttpRequest) -> Workers:
    """Return the GPU workers."""
    return Workers(items=[_worker(row) for row in workers.recent(limit=_MAX_WORKERS)])


@router.post("/workers/{worker_id}/drain", response=WorkerOut, summary="Drain a worker")
@operators_only
def drain_worker(request: HttpRequest, worker_id: WorkerNumber) -> WorkerOut:
    """Have a worker take nothing new, finish what it computes and let its runs go to others; it stays alive."""
    user = caller(request)
    workers.drain(access.get_worker(user, worker_id))
    return _worker(access.get_worker(user, worker_id))


@router.post("/workers/{worker_id}/resume", response=WorkerOut, summary="Resume a worker")
@operators_only
def resume_worker(request: HttpRequest, worker_id: WorkerNumber) -> WorkerOut:
    """Let a drained worker take runs again."""
    user = caller(request)
    workers.resume(access.get_worker(user, worker_id))
    return _worker(access.get_worker(user, worker_id))


def _worker(row: Worker) -> WorkerOut:
    is_alive: bool = row.is_alive  # type: ignore[attr-defined]
    return WorkerOut(
        id=row.pk,
        state=workers.state_of(row),
        host=row.host,
        device=row.device,
        dtype=row.dtype,
        is_alive=is_alive,
        num_runs=row.num_runs,  # type: ignore[attr-defined]
        num_samples=row.num_samples,  # type: ignore[attr-defined]
        busy_share=row.busy_share,
        samplers=row.samplers if is_alive else {},
        started_at=row.started_at,
        drain_asked_at=row.drain_asked_at,
        stopped_at=row.stopped_at,
    )


@router.get("/base-models", response=BaseModels, summary="List base models")
def list_base_models(request: HttpRequest) -> BaseModels:
    """Return the base models that can be trained and sampled from."""
    return BaseModels(
        items=[
            BaseModelOut(
                name=info.name,
                is_loaded=info.is_loaded,
                error=info.error,
                architecture=info.architecture,
                num_parameters=info.num_parameters or None,
                vocab_size=info.vocab_size or None,
                max_context=info.max_context or None,
                max_rank=info.max_rank or None,
            )
            for info in base_models.available()
        ]
    )
