"""Health for supervisors and load balancers: alive, and ready to train."""

from __future__ import annotations

from django.db import DatabaseError
from django.http import HttpRequest, JsonResponse

from runs.pages.policies import public
from runs.services import base_models, workers


@public
def live(request: HttpRequest) -> JsonResponse:
    """Answer while the web process runs."""
    return JsonResponse({"status": "ok"})


@public
def ready(request: HttpRequest) -> JsonResponse:
    """Answer 200 once the database, a live worker and at least one base model are there.

    A base model that could not be loaded is named with its error and does not make the server unready.
    """
    try:
        num_workers = workers.live().count()
        models = base_models.available()
    except DatabaseError:
        return JsonResponse({"status": "unavailable", "database": "not reachable"}, status=503)
    is_ready = num_workers > 0 and any(model.is_loaded for model in models)
    content = {
        "status": "ready" if is_ready else "starting",
        "database": "ok",
        "num_workers": num_workers,
        "base_models": {
            model.name: model.error or ("loaded" if model.is_loaded else "loading") for model in models
        },
    }
    return JsonResponse(content, status=200 if is_ready else 503)
