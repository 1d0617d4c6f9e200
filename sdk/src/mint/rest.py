"""The REST client: runs, checkpoints, sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _upstream
from .future import Future, submitted


class RestClient(_upstream.RestClient):
    """tinker's RestClient; `*_async` methods submit at once and return a Future."""


def _at_once(name: str) -> Callable[..., Future[Any]]:
    def submit(self: RestClient, *args: Any, **kwargs: Any) -> Future[Any]:
        return submitted(lambda: Future(_upstream.start(_upstream.RestClient, name, self, *args, **kwargs)))

    submit.__name__ = f"{name}_async"
    submit.__qualname__ = f"RestClient.{name}_async"
    submit.__doc__ = f"Submit `{name}(...)` and return its Future."
    return submit


for _name in dir(_upstream.RestClient):
    if _name.endswith("_async"):
        setattr(RestClient, _name, _at_once(_name.removesuffix("_async")))


def adopt_rest_client(client: Any) -> RestClient:
    """Make tinker's client one of this package's, in place."""
    client.__class__ = RestClient
    return client
