"""Every page declares who may open it, by one of these decorators; the route test enforces it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from django.contrib.auth.decorators import login_required
from django.db import DataError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import render

from runs.exceptions import MintError, NotFound, RequestInvalid
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
            if any("\0" in str(arg) for arg in kwargs.values()):  # no text of PostgreSQL's holds one
                raise NotFound
            return view(request, *args, **kwargs)
        except MintError as error:
            return _error_page(request, error)
        except DataError:
            if not (fields := _fields_with_nul(request)):
                raise
            return _error_page(request, RequestInvalid("must not hold NUL", place=fields[0]))

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


def _fields_with_nul(request: HttpRequest) -> list[str]:
    fields = [*request.GET.lists(), *request.POST.lists()]
    return [name[:80] for name, values in fields if any("\0" in value for value in values)]


def _error_page(request: HttpRequest, error: MintError) -> HttpResponse:
    if request.headers.get("accept", "").startswith("application/json"):
        return JsonResponse({"detail": str(error), "code": error.code}, status=error.http_status)
    return render(request, "error.html", {"error": error}, status=error.http_status)
