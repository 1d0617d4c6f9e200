"""Every page declares who may open it, by one of these decorators; the route test enforces it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from urllib.parse import urlsplit

from django.contrib.auth.views import redirect_to_login
from django.db import DataError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import render, resolve_url
from django.utils.http import url_has_allowed_host_and_scheme

from runs.exceptions import MethodNotAllowed, MintError, NotFound, RequestInvalid
from runs.models import User
from runs.services import access

View = TypeVar("View", bound=Callable[..., HttpResponseBase])


def public(view: View) -> View:
    """Let anyone open the page."""
    view.policy = "public"  # type: ignore[attr-defined]
    return view


def signed_in(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """Ask for a login; the view reaches rows through `services.access`, so only the user's own."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if not request.user.is_authenticated:
            return redirect_to_login(_page_of(request))
        try:
            if any("\0" in str(arg) for arg in kwargs.values()):  # no text of PostgreSQL's holds one
                raise NotFound
            response = view(request, *args, **kwargs)
            return _not_allowed(request, response) if response.status_code == 405 else response
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


def _page_of(request: HttpRequest) -> str:
    """Return where to go on after a sign-in: a form's address cannot be opened, so the page that it was on."""
    if request.method in ("GET", "HEAD"):
        return request.get_full_path()
    page = request.headers.get("referer", "")
    is_ours = url_has_allowed_host_and_scheme(page, allowed_hosts={request.get_host()})
    return urlsplit(page)._replace(scheme="", netloc="").geturl() if is_ours else resolve_url("run-list")


def _not_allowed(request: HttpRequest, refusal: HttpResponseBase) -> HttpResponse:
    """Return a page in the place of the empty answer of Django's decorators."""
    page = _error_page(
        request,
        MethodNotAllowed("This address only takes what a form sends. Go back to the page with the form."),
    )
    page["Allow"] = refusal["Allow"]
    return page


def _fields_with_nul(request: HttpRequest) -> list[str]:
    fields = [*request.GET.lists(), *request.POST.lists()]
    return [name[:80] for name, values in fields if any("\0" in value for value in values)]


def _error_page(request: HttpRequest, error: MintError) -> HttpResponse:
    if request.headers.get("accept", "").startswith("application/json"):
        return JsonResponse({"detail": str(error), "code": error.code}, status=error.http_status)
    return render(request, "error.html", {"error": error}, status=error.http_status)
