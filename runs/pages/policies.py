"""Every page declares who may open it, by one of these decorators; the route test enforces it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import render

from runs.exceptions import MintError
from runs.models import User
from runs.services import access

View = TypeVar("View", bound=Callable[..., HttpResponseBase])


def public(view: View) -> View:
    """Let anyone open the page."""
    view.policy = "public"  # type: ignore[attr-defined]
    return view


def signed_in(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """Ask for a login; the view reaches rows through `services.access`, so only the user's own."""

    @login_required
    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        try:
            return view(request, *args, **kwargs)
        except MintError as error:
            return _error_page(request, error)

    guarded.policy = "owner"  # type: ignore[attr-defined]
    return guarded


def operator(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """Ask for a login with staff rights."""

    @wraps(view)
    def checked(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        user: User = request.user  # type: ignore[assignment]
        access.check_operator(user)
        return view(request, *args, **kwargs)

    guarded = signed_in(checked)
    guarded.policy = "operator"  # type: ignore[attr-defined]
    return guarded


def _error_page(request: HttpRequest, error: MintError) -> HttpResponse:
    if request.headers.get("accept", "").startswith("application/json"):
        return JsonResponse({"detail": str(error), "code": error.code}, status=error.http_status)
    return render(request, "error.html", {"error": error}, status=error.http_status)
