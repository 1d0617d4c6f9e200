"""Sign in by password or by a one-time link, and sign out."""

from __future__ import annotations

from django.conf import settings
from django.contrib.auth import authenticate, login, logout
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_http_methods, require_POST

from runs.exceptions import NotFound
from runs.pages.policies import public
from runs.services import accounts, lockout

_BACKEND = "django.contrib.auth.backends.ModelBackend"


@public
@never_cache
@sensitive_post_parameters("password")
@require_http_methods(["GET", "POST"])
def password(request: HttpRequest) -> HttpResponseBase:
    """Ask for a name and password."""
    target = _target(request)
    if request.method == "GET":
        return redirect(target) if request.user.is_authenticated else _form(request, target)
    name = request.POST.get("username", "")[:150].replace("\0", "\ufffd")  # no row's text holds one
    attempt = lockout.Attempt(name=name, address=request.META.get("REMOTE_ADDR", ""))
    wait_s = attempt.begin()
    if wait_s:
        minutes = max(1, round(wait_s / 60))
        return _form(
            request, target, name=name, status=429, problem=f"Too many wrong tries. Wait {minutes} min."
        )
    user = authenticate(request, username=name, password=request.POST.get("password", "")[:4096])
    if user is None:
        return _form(request, target, name=name, status=403, problem="This name and password do not match.")
    attempt.succeed()
    login(request, user)
    return redirect(target)


@public
@never_cache
@require_http_methods(["GET", "POST"])
def link(request: HttpRequest, token: str) -> HttpResponseBase:
    """Sign in by a one-time link.

    Opening the address only shows a button: mail scanners and link previews open addresses too, and
    would spend the link before its reader could.
    """
    if request.method == "GET":
        return render(request, "login_link.html")
    try:
        user = accounts.use_login_link(token[:200])
    except NotFound as error:
        return render(request, "login_link.html", {"problem": error.message}, status=403)
    login(request, user, backend=_BACKEND)
    return redirect(settings.LOGIN_REDIRECT_URL)


@public
@require_POST
def sign_out(request: HttpRequest) -> HttpResponseBase:
    """End the session."""
    logout(request)
    return redirect(settings.LOGIN_URL)


def _target(request: HttpRequest) -> str:
    asked = request.POST.get("next") or request.GET.get("next", "")
    is_ours = url_has_allowed_host_and_scheme(
        asked, allowed_hosts={request.get_host()}, require_https=request.is_secure()
    )
    return asked if is_ours else settings.LOGIN_REDIRECT_URL


def _form(
    request: HttpRequest, target: str, *, name: str = "", problem: str = "", status: int = 200
) -> HttpResponse:
    return render(request, "login.html", {"next": target, "name": name, "problem": problem}, status=status)
