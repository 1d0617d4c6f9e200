"""GPU workers, alive or ended, the base models they offer, and the buttons that empty a worker and fill it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from django.contrib import messages
from django.http import HttpRequest, HttpResponseBase, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from runs.models import User, Worker
from runs.pages.policies import operator, signed_in
from runs.services import access, base_models, workers
from runs.services.workers import WorkerState

MAX_ROWS: Final = 20
_TONES: Final = {
    WorkerState.ALIVE: "good",
    WorkerState.DRAINING: "busy",
    WorkerState.DRAINED: "warn",
    WorkerState.LOST: "done",
    WorkerState.ENDED: "done",
}


@dataclass(frozen=True, kw_only=True)
class WorkerRow:
    """What the table shows of a worker.

    `only_here` are the base models for which no other one takes runs, `samplers` who draws samples of a base model
    where there is a server for that.
    """

    pk: int
    state: WorkerState
    tone: str
    host: str
    pid: int
    device: str
    dtype: str
    busy_share: float | None
    num_runs: int
    num_samples: int
    started_at: datetime
    stopped_at: datetime | None
    can_drain: bool
    can_resume: bool
    only_here: str
    samplers: list[str]


@signed_in
@require_GET
def worker_list(request: HttpRequest) -> HttpResponseBase:
    """Show the workers and base models."""
    serving = list(workers.serving())
    context = {
        "workers": [_row(worker, serving) for worker in workers.recent(limit=MAX_ROWS)],
        "models": base_models.available(),
        "outlook": workers.outlook(),
        "is_operator": _user(request).is_staff,
    }
    template = "workers/_workers.html" if "part" in request.GET else "workers/worker_list.html"
    return render(request, template, context)


@operator
@require_POST
def drain(request: HttpRequest, pk: int) -> HttpResponseBase:
    """Have a worker take nothing new and let its runs go."""
    worker = access.get_worker(_user(request), pk)
    workers.drain(worker)
    return _done(request, f"Worker {worker} takes nothing new and lets its runs go.")


@operator
@require_POST
def resume(request: HttpRequest, pk: int) -> HttpResponseBase:
    """Let a drained worker take runs again."""
    worker = access.get_worker(_user(request), pk)
    workers.resume(worker)
    return _done(request, f"Worker {worker} takes runs again.")


def _row(worker: Worker, serving: Sequence[Worker]) -> WorkerRow:
    state = workers.state_of(worker)
    is_alive = state not in (WorkerState.LOST, WorkerState.ENDED)
    elsewhere = {name for other in serving if other != worker for name in workers.models_of(other)}
    return WorkerRow(
        pk=worker.pk,
        state=state,
        tone=_TONES[state],
        host=worker.host,
        pid=worker.pid,
        device=worker.device or "-",
        dtype=worker.dtype or "-",
        busy_share=worker.busy_share if is_alive else None,
        num_runs=worker.num_runs,  # type: ignore[attr-defined]
        num_samples=worker.num_samples,  # type: ignore[attr-defined]
        started_at=worker.started_at,
        stopped_at=worker.stopped_at,
        can_drain=state == WorkerState.ALIVE,
        can_resume=state in (WorkerState.DRAINING, WorkerState.DRAINED),
        only_here=", ".join(name for name in workers.models_of(worker) if name not in elsewhere),
        samplers=[f"{name}: {words}" for name, words in worker.samplers.items()] if is_alive else [],
    )


def _done(request: HttpRequest, message: str) -> HttpResponseBase:
    if request.headers.get("accept", "").startswith("application/json"):
        return JsonResponse({"detail": message})
    messages.success(request, message)
    return redirect("worker-list")


def _user(request: HttpRequest) -> User:
    user: User = request.user  # type: ignore[assignment]
    return user
