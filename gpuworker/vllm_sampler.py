"""Samples drawn by a vLLM server, for the sample desk: submit, take what has ended, and go on.

One thread with an event loop speaks HTTP, so that compute never waits for the server. What the server does not draw, for
whatever reason, ends as a `Refusal`: the desk then has the engine draw it. The server is a process of its own, in an
environment of its own, which an operator starts; it may go away and come back at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

import httpx

from gpuworker import vllm_wire
from gpuworker.engine.types import SampleRequest, SampleResult
from gpuworker.vllm_adapters import Folders, ServerAdapters
from gpuworker.vllm_client import ServedModel, Server, Unfit, VllmClient
from gpuworker.vllm_wire import Refusal, StreamedCompletion

logger = logging.getLogger(__name__)

Outcome: TypeAlias = tuple[str, SampleResult | Refusal]

_MAX_REASONS: Final = 100
_STOP_S: Final = 2.0
_MIXED_UP: Final = "those of the base model itself, which this build answers with an adapter's weights"


class VllmSampler:
    """The requests of one base model that a vLLM server draws.

    Args:
        on_ended: called from another thread whenever `step` has something to return.
        api_key: what the server was started with as --api-key, or an empty string.
        look_s: how often the server is looked at.
        silence_s: how long it may be silent to what it answers at once.
    """

    def __init__(
        self,
        url: str,
        model: ServedModel,
        folders: Folders,
        *,
        on_ended: Callable[[], None],
        api_key: str,
        look_s: float,
        silence_s: float,
    ) -> None:
        self._model = model
        self._on_ended = on_ended
        self._look_s = look_s
        self._client = VllmClient(url, model, api_key=api_key, silence_s=silence_s)
        self._adapters = ServerAdapters(self._client.http, folders)
        self._server: Server | None = None
        self._absence = f"the vLLM server at {self._client.address} was not reached yet"
        self._exception = ""
        self._reasons: set[str] = set()
        self._is_mixed_up = False
        self._checked_loads = 0
        self._checking = asyncio.Lock()
        self._open: set[str] = set()
        self._ended: deque[Outcome] = deque()
        self._streams: dict[str, StreamedCompletion] = {}
        self._tasks: dict[str, asyncio.Task[SampleResult]] = {}
        self._doubt, self._stopping = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all requests and the thread; again is fine."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    @property
    def words(self) -> str:
        """Return who draws the samples at present, as people read it."""
        server = self._server
        if server is None:
            return f"samples by the engine: {self._absence}"
        words = f"samples by vLLM {server.version} at {self._client.address}"
        return f"{words}; some by the engine: {self._exception}" if self._exception else words

    # Called by the compute stage ------------------------------------------------------------------------------

    def accepts(self, request: SampleRequest) -> bool:
        """Say whether the server is there and nothing is known that speaks against asking it."""
        server = self._server
        if server is None:
            return False
        if request.sampler_id is None and self._is_mixed_up:
            reason = _MIXED_UP
        else:
            reason = self._adapters.refused.get(request.sampler_id or "") or vllm_wire.unsuited(
                request, max_new=self._model.max_new(request), max_model_len=server.max_model_len
            )
        self._note_exception(reason)
        return not reason

    @property
    def num_pending(self) -> int:
        """Return the number of requests whose outcome `step` has not returned."""
        return len(self._open)

    def submit(self, request: SampleRequest, *, is_watched: bool) -> None:
        """Ask the server; the tokens of a watched request can be seen early where vLLM can stream them."""
        self._open.add(request.request_id)
        stream = StreamedCompletion() if is_watched and vllm_wire.can_be_streamed(request) else None
        if stream is not None:
            self._streams[request.request_id] = stream
        self._loop.call_soon_threadsafe(self._begin, request, stream)

    def cancel(self, request_id: str) -> bool:
        """Forget a request and close its connection, which ends it on the server; return whether it was there."""
        is_known = request_id in self._open
        self._forget(request_id)
        self._loop.call_soon_threadsafe(self._cancel, request_id)
        return is_known

    def tokens_of(self, request_id: str, *, start: int) -> list[int]:
        """Return the tokens from a position on that have been streamed so far."""
        stream = self._streams.get(request_id)
        return stream.tokens[start:] if stream is not None else []

    def step(self) -> list[Outcome]:
        """Return the requests that have ended since the last call; never waits."""
        outcomes = []
        while self._ended:
            request_id, outcome = self._ended.popleft()
            if request_id in self._open:  # else it was cancelled
                self._forget(request_id)
                outcomes.append((request_id, outcome))
        return outcomes

    def drop(self, sampler_id: str) -> None:
        """Have the server forget an adapter; requests already submitted finish with it."""
        self._loop.call_soon_threadsafe(self._adapters.drop, sampler_id)

    def _forget(self, request_id: str) -> None:
        self._open.discard(request_id)
        self._streams.pop(request_id, None)

    def _note_exception(self, reason: str) -> None:
        """Keep for people why the engine draws a sample, and log it once."""
        if not reason:
            return
        self._exception = reason
        if reason not in self._reasons and len(self._reasons) < _MAX_REASONS:
            self._reasons.add(reason)
            logger.warning("%s: the engine draws what vLLM does not: %s", self._model.name, reason)

    # In the thread of the loop --------------------------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        async with self._client.http:
            watching = asyncio.create_task(self._watch())
            await self._stopping.wait()
            self._doubt.set()
            await asyncio.wait([watching], timeout=_STOP_S)  # a look that is cancelled may leave a connection
            tasks = [watching, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._adapters.stop()

    def _begin(self, request: SampleRequest, stream: StreamedCompletion | None) -> None:
        task = asyncio.create_task(self._draw(request, stream))
        self._tasks[request.request_id] = task
        task.add_done_callback(partial(self._end, request.request_id))

    def _cancel(self, request_id: str) -> None:
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    def _end(self, request_id: str, task: asyncio.Task[SampleResult]) -> None:
        del self._tasks[request_id]
        outcome: SampleResult | Refusal
        if task.cancelled():
            outcome = Refusal(self._absence)
        elif (error := task.exception()) is None:
            outcome = task.result()
        elif isinstance(error, Refusal):
            outcome = error
        else:
            logger.error("an answer of vLLM could not be taken", exc_info=error)
            outcome = Refusal(f"an answer that could not be taken: {type(error).__name__}")
        if isinstance(outcome, Refusal) and self._server is not None:
            self._note_exception(str(outcome))
        self._ended.append((request_id, outcome))
        self._on_ended()

    async def _draw(self, request: SampleRequest, stream: StreamedCompletion | None) -> SampleResult:
        server = self._server
        if server is None:
            raise Refusal(self._absence)
        try:
            if request.sampler_id is None:
                result = await self._client.complete(request, server.model, stream)
                await self._check_base(server)
                return result
            async with self._adapters.used(request.sampler_id):
                return await self._client.complete(request, request.sampler_id, stream)
        except httpx.TransportError as error:
            self._lose(_silence(error))
            self._doubt.set()
            raise Refusal(self._absence) from error
        except httpx.HTTPStatusError as error:
            self._doubt_after(error.response.status_code, request)
            raise Refusal(vllm_wire.reason_of(error.response.content)) from error

    async def _check_base(self, server: Server) -> None:
        """Make sure that a sample of the base model was one, if adapters were loaded since that was last seen.

        vLLM 0.32.0 for CPUs adds the last of its places for adapters to what is asked without one.
        """
        async with self._checking:
            num_loads = self._adapters.num_loads
            if num_loads != self._checked_loads and not self._is_mixed_up:
                self._is_mixed_up = not await self._client.has_own_weights(server)
                self._checked_loads = num_loads
        if self._is_mixed_up:
            raise Refusal(_MIXED_UP)

    def _doubt_after(self, status: int, request: SampleRequest) -> None:
        """Look into an answer that a server gives that was started anew, or does not work any more."""
        if status == httpx.codes.NOT_FOUND and request.sampler_id is not None:
            self._adapters.forget(request.sampler_id)
        elif status == httpx.codes.NOT_FOUND:
            self._lose("does not know its model any more")
            self._doubt.set()
        elif status >= httpx.codes.INTERNAL_SERVER_ERROR:
            self._doubt.set()

    # Whether the server is there ------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while not self._stopping.is_set():
            self._doubt.clear()
            await self._look()
            if not self._stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._doubt.wait(), self._look_s)

    async def _look(self) -> None:
        """Find out whether the server can be asked; requests of one that fell silent are given up."""
        try:
            if self._server is not None:
                await self._client.ping()
            else:
                self._welcome(await self._client.attach())
        except Unfit as error:
            self._lose(str(error))
        except httpx.HTTPError as error:
            self._lose(_silence(error))
            for task in list(self._tasks.values()):
                task.cancel()

    def _welcome(self, server: Server) -> None:
        self._adapters.forget_all()
        self._checked_loads = self._adapters.num_loads
        self._is_mixed_up = False
        self._exception = ""
        self._server = server
        logger.info("%s: %s", self._model.name, self.words)

    def _lose(self, reason: str) -> None:
        """Draw with the engine until the server was looked at with success."""
        absence = f"the vLLM server at {self._client.address} {reason}"
        if self._server is not None or absence != self._absence:
            logger.warning("%s: samples by the engine: %s", self._model.name, absence)
        self._absence = absence
        self._server = None
        self._adapters.forget_all()


def _silence(error: httpx.HTTPError) -> str:
    is_silent = isinstance(error, httpx.TransportError)
    return f"{'does not answer' if is_silent else 'gives no whole answer'} ({type(error).__name__})"
