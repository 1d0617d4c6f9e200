"""Health for supervisors and load balancers: alive, and ready to train."""

from __future__ import annotations

from typing import Final

from django.db import DatabaseError
from django.http import HttpRequest, JsonResponse

from runs.pages.policies import public
from runs.services import base_models, workers
from runs.services.base_models import BaseModelInfo

_LOADED: Final = "loaded"


@public
def live(request: HttpRequest) -> JsonResponse:
    """Answer while the web process runs."""
    return JsonResponse({"status": "ok"})


@public
def ready(request: HttpRequest) -> JsonResponse:
    """Answer 200 once the database is there and a live worker takes work for at least one base model.

    A base model that could not be loaded is named with its error and does not make the server unready.
    """
    try:
        num_workers = workers.live().count()
        models = {model.name: _state_of(model) for model in base_models.available()}
    except DatabaseError:
        return JsonResponse({"status": "unavailable", "database": "not reachable"}, status=503)
    is_ready = _LOADED in models.values()
    content = {
        "status": "ready" if is_ready else "starting",
        "database": "ok",
        "num_workers": num_workers,
        "base_models": models,
    }
    return JsonResponse(content, status=200 if is_ready else 503)


def _state_of(model: BaseModelInfo) -> str:
    """Return what some live worker makes of a base model: one that served it and has ended does not count."""
    return model.error or (_LOADED if workers.having(model.name).exists() else "loading")
