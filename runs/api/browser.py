"""Who is signed in in the browser that sends a request to a lean endpoint: Django's own session and token checks."""

from __future__ import annotations

import io

from django.contrib.auth import get_user
from django.contrib.sessions.middleware import SessionMiddleware
from django.core.exceptions import DisallowedHost
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponse
from django.middleware.csrf import CsrfViewMiddleware

from runs.api.decorators import Scope
from runs.exceptions import NotAuthenticated, RequestInvalid, TokenRefused
from runs.models import User


def signed_in_user(scope: Scope) -> User:
    """Return whose session the cookie names; asks the database.

    Raises:
        NotAuthenticated: nobody's.
        TokenRefused: the request changes something and lacks the page's token as X-CSRFToken, or it comes
            from another site.
        RequestInvalid: the Host header is none of this server's.
    """
    # Django reads fields of a form for the token too; the body is the upload's and stays out of its sight.
    request = ASGIRequest(scope, io.BytesIO())
    SessionMiddleware(_nothing).process_request(request)
    user = get_user(request)
    if not isinstance(user, User) or not user.is_active:
        raise NotAuthenticated("sign in, or send an API key as the X-API-Key header")
    try:
        request.get_host()
    except DisallowedHost:
        raise RequestInvalid("this server does not answer to that name", place="host") from None
    check = CsrfViewMiddleware(_nothing)
    check.process_request(request)
    if check.process_view(request, _nothing, (), {}) is not None:
        raise TokenRefused
    return user


def _nothing(request: HttpRequest) -> HttpResponse:
    return HttpResponse()
