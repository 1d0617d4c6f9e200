"""What differs between the supported tinker versions, as seen from this package.

0.22: most synchronous client methods block, and the work is done by coroutines named `*_async`.
0.38: the same methods return futures, and the `*_async` ones are deprecated.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from typing import Any

import tinker
from tinker import APIFuture

METHODS_RETURN_FUTURES = hasattr(tinker, "RestClient")

if METHODS_RETURN_FUTURES:
    from tinker import RestClient
else:
    from tinker.lib.public_interfaces.rest_client import RestClient

__all__ = ["METHODS_RETURN_FUTURES", "RestClient", "behind", "start", "undeprecated"]


def behind(pending: Any) -> ConcurrentFuture[Any]:
    """Return the concurrent future behind what a tinker method returned, be it the value itself."""
    if isinstance(pending, APIFuture):
        return pending.future()
    if isinstance(pending, ConcurrentFuture):
        return pending
    future: ConcurrentFuture[Any] = ConcurrentFuture()
    future.set_result(pending)
    return future


def undeprecated(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method without the wrapper that warns of its deprecation."""
    return method.__wrapped__ if hasattr(method, "__deprecated__") else method


def start(owner: type, name: str, client: Any, *args: Any, **kwargs: Any) -> ConcurrentFuture[Any]:
    """Start `owner.name` on the client without waiting, whichever way this version offers."""
    if METHODS_RETURN_FUTURES:
        return behind(undeprecated(getattr(owner, name))(client, *args, **kwargs))
    coroutine = getattr(owner, f"{name}_async")(client, *args, **kwargs)
    return client.holder.run_coroutine_threadsafe(coroutine).future()
