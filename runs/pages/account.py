"""A person's settings: API keys and password. The theme is kept by the browser."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from django.contrib import messages
from django.contrib.auth import update_session_auth_hash
from django.contrib.auth.password_validation import (
    CommonPasswordValidator,
    MinimumLengthValidator,
    validate_password,
)
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_GET, require_POST

from runs.models import ApiKey, User
from runs.pages.policies import signed_in
from runs.pages.run_list import base_url
from runs.services import access, accounts, idempotency, keys
from runs.services.idempotency import Answer

_VALIDATORS: list[Any] = [MinimumLengthValidator(min_length=10), CommonPasswordValidator()]


@signed_in
@never_cache
@require_GET
def settings_page(request: HttpRequest) -> HttpResponseBase:
    """Show the keys and the password form."""
    return _page(request)


@signed_in
@never_cache
@require_POST
def create_key(request: HttpRequest) -> HttpResponseBase:
    """Make a key and show its secret this one time: it is in this answer and nowhere else.

    The same form may come twice, by a double click or when this answer is loaded again; it makes one key.
    """
    user = _user(request)
    name = "".join(c for c in request.POST.get("name", "") if c.isprintable()).strip() or "unnamed"
    made: list[tuple[ApiKey, str]] = []

    def make() -> Answer:
        made.append(keys.create_key(user, name))
        return Answer(status=201, body=b"")

    idempotency.once(user, _form_key(request, name), digest="", answer=make)
    if not made:
        messages.warning(
            request,
            f"Key {name} was already created, and its secret was shown then. If it is lost, revoke the key and create another.",
        )
        return redirect("settings")
    key, secret = made[0]
    return _page(request, new_key=key, spellings=keys.spellings(secret))


@signed_in
@require_POST
def revoke_key(request: HttpRequest, pk: int) -> HttpResponseBase:
    """Make a key worthless."""
    keys.revoke_key(_user(request), pk)
    messages.success(request, "The key was revoked.")
    return redirect("settings")


@signed_in
@sensitive_post_parameters()
@require_POST
def change_password(request: HttpRequest) -> HttpResponseBase:
    """Set a password, or change it by giving the old one; other browsers are signed out."""
    user = _user(request)
    new = request.POST.get("new_password", "")
    problem = _problem(user, request.POST.get("old_password", ""), new, request.POST.get("repeated", ""))
    if problem:
        return _page(request, password_problem=problem, status=422)
    accounts.set_password(user, new)
    update_session_auth_hash(request, user)
    messages.success(request, "The password was saved.")
    return redirect("settings")


def _form_key(request: HttpRequest, name: str) -> str:
    """Return what tells a form from others: its token is masked anew on every page that is made."""
    token = request.POST.get("csrfmiddlewaretoken") or secrets.token_hex()
    return f"key form {hashlib.sha256(f'{token} {name}'.encode()).hexdigest()}"


def _problem(user: User, old: str, new: str, repeated: str) -> str:
    if user.has_usable_password() and not user.check_password(old):
        return "The current password is not right."
    if new != repeated:
        return "The two new passwords differ."
    try:
        validate_password(new, user, password_validators=_VALIDATORS)
    except ValidationError as error:
        return " ".join(error.messages)
    return ""


def _page(request: HttpRequest, *, status: int = 200, **extra: object) -> HttpResponse:
    user = _user(request)
    context = {
        "keys": access.keys_of(user),
        "base_url": base_url(request),
        "has_password": user.has_usable_password(),
        **extra,
    }
    return render(request, "settings/settings.html", context, status=status)


def _user(request: HttpRequest) -> User:
    user: User = request.user  # type: ignore[assignment]
    return user
