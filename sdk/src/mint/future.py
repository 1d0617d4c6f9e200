"""The futures that clients return: submitted already, to be awaited or waited for at any time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError
from concurrent.futures import Future as ConcurrentFuture
from typing import Any, TypeVar

from tinker import APIFuture

from .results import settle

T = TypeVar("T")


class Future(APIFuture[T]):
    """An operation that has been submitted.

    Giving up waiting (a timeout, a cancelled task) leaves the operation alone: it has its place in
    the client's order, and withdrawing it would stop all that come after it.
    """

    def __init__(self, future: ConcurrentFuture[T]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result in this thread.

        Args:
            timeout: seconds, None for no limit.

        Raises:
            TimeoutError: the result is not there yet. The operation goes on.
            Exception: what the operation failed with.
        """
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """Wait for the result without blocking the event loop. See `result`."""
        if not self._future.done():
            async with asyncio.timeout(timeout):
                await _completion(self._future)
        return self._future.result()

    def future(self) -> ConcurrentFuture[T]:
        """Return the concurrent future, for `concurrent.futures.wait` and the like."""
        return self._future

    def done(self) -> bool:
        """Tell whether the operation has succeeded or failed."""
        return self._future.done()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def __repr__(self) -> str:
        if not self.done():
            return f"<{type(self).__name__}: pending>"
        error = self._future.exception()
        return f"<{type(self).__name__}: {'done' if error is None else f'failed: {error!r}'}>"


class ClientFuture(Future[T]):
    """A client that is being created. Used as the client, it first waits for it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.result(), name)


async def _completion(future: ConcurrentFuture[Any]) -> None:
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake(_: object) -> None:
        if not waiter.done():
            waiter.set_result(None)

    def wake_from_any_thread(_: object) -> None:
        # The loop is closed when the caller ended without waiting any longer.
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake, None)

    future.add_done_callback(wake_from_any_thread)
    await waiter


def relay(
    source: ConcurrentFuture[Any], target: ConcurrentFuture[Any], convert: Callable[[Any], Any] = settle
) -> None:
    """Complete the target as the source completes, with the result converted."""

    def copy(done: ConcurrentFuture[Any]) -> None:
        error = CancelledError() if done.cancelled() else done.exception()
        if error is None:
            resolve(target, lambda: convert(done.result()))
        else:
            target.set_exception(error)

    source.add_done_callback(copy)


def resolve(target: ConcurrentFuture[Any], call: Callable[[], Any]) -> None:
    """Complete the target with what the call returns or raises."""
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - the future's reader gets it
        target.set_exception(error)
    else:
        target.set_result(result)


def pending_future() -> ConcurrentFuture[Any]:
    """Return an open future that its readers cannot cancel."""
    future: ConcurrentFuture[Any] = ConcurrentFuture()
    future.set_running_or_notify_cancel()
    return future


def converted(source: ConcurrentFuture[Any], convert: Callable[[Any], Any] = settle) -> ConcurrentFuture[Any]:
    """Return a future of the source's result, converted."""
    target = pending_future()
    relay(source, target, convert)
    return target


def in_thread(call: Callable[[], Any]) -> ConcurrentFuture[Any]:
    """Run a blocking call in a thread of its own and return the future of its result."""
    target = pending_future()
    threading.Thread(target=resolve, args=(target, call), name="mint-call", daemon=True).start()
    return target


def submitted(call: Callable[[], Future[Any]]) -> Future[Any]:
    """Return the call's future, or a failed one if the call itself raises."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - an `*_async` call reports through its future only
        target = pending_future()
        target.set_exception(error)
        return Future(target)
