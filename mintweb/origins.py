"""Lets only this site's own pages open websockets: they bring the session's cookie from every port of the host."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from channels.security.websocket import WebsocketDenier
from django.conf import settings

App = Callable[[Any, Any, Any], Awaitable[None]]
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


class SameOrigin:
    """An ASGI application that hands on websockets of pages that this server, or its proxy, has answered."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand on a websocket, or refuse it."""
        app: Any = self._app if _is_same_origin(scope) else WebsocketDenier()
        await app(scope, receive, send)


def _is_same_origin(scope: Any) -> bool:
    """Compare scheme, host and port, as Django does for forms."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    origin = _normal(headers.get(b"origin", ""))
    scheme = "https" if scope.get("scheme") == "wss" else "http"
    own = {_normal(f"{scheme}://{headers.get(b'host', '')}"), _normal(settings.PUBLIC_URL)}
    return "://" in origin and origin in own


def _normal(origin: str) -> str:
    scheme, mark, netloc = origin.lower().partition("://")
    return f"{scheme}{mark}{netloc.removesuffix(_DEFAULT_PORTS.get(scheme, ':'))}"
