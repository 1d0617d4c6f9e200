"""GPU workers, alive or ended, and the base models they offer."""

from __future__ import annotations

from typing import Final

from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import render
from django.views.decorators.http import require_GET

from runs.pages.policies import signed_in
from runs.services import base_models, workers

MAX_ROWS: Final = 20


@signed_in
@require_GET
def worker_list(request: HttpRequest) -> HttpResponseBase:
    """Show the workers and base models."""
    found = workers.recent(limit=MAX_ROWS)
    context = {
        "workers": found,
        "models": base_models.available(),
        "has_worker": workers.live().exists(),
    }
    template = "workers/_workers.html" if "part" in request.GET else "workers/worker_list.html"
    return render(request, template, context)
