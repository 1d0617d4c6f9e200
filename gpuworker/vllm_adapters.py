"""The adapters that a vLLM server has been told of: each loaded once, before its first request, and let go when dropped.

Used in one event loop. The server keeps further copies and finds room for them by itself (--max-loras, --max-cpu-loras).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from gpuworker import vllm_wire
from gpuworker.engine.exceptions import EngineError
from gpuworker.vllm_wire import Refusal

# Loading waits for its turn in the server's engine.
_LOAD_S: Final = 120.0
_STOP_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Folders:
    """The PEFT folders that the server reads: `lend` makes sure that one is there, `take_back` says that it is not needed.

    Both are called in a thread and may take a while. The folder stays as it is meanwhile.
    """

    lend: Callable[[str], Path]
    take_back: Callable[[str], None]


@dataclass
class _Adapter:
    """One that is loaded, or being loaded; `num_users` requests want it to stay."""

    loading: asyncio.Task[None]
    num_users: int = 0
    is_dropped: bool = False


class ServerAdapters:
    """What one server has loaded for this process."""

    def __init__(self, client: httpx.AsyncClient, folders: Folders) -> None:
        self._client = client
        self._folders = folders
        self._known: dict[str, _Adapter] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.refused: dict[str, str] = {}
        self.num_loads = 0  # grows at the begin and at the end of each

    @contextlib.asynccontextmanager
    async def used(self, sampler_id: str) -> AsyncIterator[None]:
        """Have the server know an adapter while the block runs.

        Raises:
            Refusal: the server does not take it, which holds until `forget_all`, or its files cannot be read.
            httpx.TransportError: the server does not answer.
        """
        adapter = self._known.get(sampler_id)
        if adapter is None:
            loading = self._start(self._load(sampler_id, after=self._leaving.get(sampler_id)))
            adapter = self._known[sampler_id] = _Adapter(loading)
        adapter.num_users += 1
        adapter.is_dropped = False
        try:
            await asyncio.shield(adapter.loading)
            yield
        finally:
            adapter.num_users -= 1
            self._let_go(sampler_id, adapter)

    def drop(self, sampler_id: str) -> None:
        """Have the server forget an adapter once no request uses it; one that it does not know is fine."""
        self.refused.pop(sampler_id, None)
        adapter = self._known.get(sampler_id)
        if adapter is not None:
            adapter.is_dropped = True
            self._let_go(sampler_id, adapter)

    def forget(self, sampler_id: str) -> None:
        """Assume that the server does not know an adapter; its folder is taken back once no request uses it."""
        adapter = self._known.pop(sampler_id, None)
        if adapter is not None:
            adapter.is_dropped = True
            self._let_go(sampler_id, adapter)

    def forget_all(self) -> None:
        """Assume nothing of the server: it may have been started anew, with other limits."""
        for sampler_id in list(self._known):
            self.forget(sampler_id)
        self.refused.clear()

    async def stop(self) -> None:
        """End what is going on, and have the server forget what it was told if it does so at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        unloading = [self._unload(name, adapter.loading) for name, adapter in self._known.items()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await asyncio.gather(*unloading)

    def _let_go(self, sampler_id: str, adapter: _Adapter) -> None:
        is_failed = adapter.loading.done() and (
            adapter.loading.cancelled() or adapter.loading.exception() is not None
        )
        if adapter.num_users or not (adapter.is_dropped or is_failed):
            return
        is_known = self._known.get(sampler_id) is adapter
        if is_known:
            del self._known[sampler_id]
        if not (is_failed or self._is_lent_anew(sampler_id, adapter.loading)):
            self._leave(sampler_id, adapter.loading, is_known=is_known)

    def _is_lent_anew(self, sampler_id: str, loading: asyncio.Task[None] | None) -> bool:
        """Say whether the folder is another one's by now, which was loaded after this one was forgotten."""
        known = self._known.get(sampler_id)
        return known is not None and known.loading is not loading

    def _leave(self, sampler_id: str, loading: asyncio.Task[None], *, is_known: bool) -> None:
        """Take the folder back; it is not lent again before that is done."""
        leaving = self._start(self._unload(sampler_id, loading, is_known=is_known))
        self._leaving[sampler_id] = leaving

        def end(_: asyncio.Task[None]) -> None:
            if self._leaving.get(sampler_id) is leaving:
                del self._leaving[sampler_id]

        leaving.add_done_callback(end)

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, sampler_id: str, *, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await asyncio.wait([after])
        try:
            folder = await asyncio.to_thread(self._folders.lend, sampler_id)
        except (EngineError, OSError) as error:
            raise Refusal(f"an adapter whose files cannot be read: {error}") from error
        try:
            await self._tell(sampler_id, folder)
        except BaseException:
            if not self._is_lent_anew(sampler_id, asyncio.current_task()):
                self._folders.take_back(sampler_id)
            raise

    async def _tell(self, sampler_id: str, folder: Path) -> None:
        body = {"lora_name": sampler_id, "lora_path": str(folder)}
        self.num_loads += 1
        answer = await self._client.post("/v1/load_lora_adapter", json=body, timeout=_LOAD_S)
        self.num_loads += 1  # it took effect somewhere in between
        # Another worker of this server may have told it, or this one before it lost sight of it.
        if answer.status_code != httpx.codes.OK and b"already been loaded" not in answer.content:
            self.refused[sampler_id] = vllm_wire.reason_of(answer.content)
            raise Refusal(f"an adapter that the server does not take: {self.refused[sampler_id]}")

    async def _unload(self, sampler_id: str, loading: asyncio.Task[None], *, is_known: bool = True) -> None:
        await asyncio.wait([loading])
        with contextlib.suppress(httpx.TransportError):  # then it has forgotten everything
            if is_known:
                body = {"lora_name": sampler_id}
                await self._client.post("/v1/unload_lora_adapter", json=body, timeout=_LOAD_S)
        await asyncio.to_thread(self._folders.take_back, sampler_id)
