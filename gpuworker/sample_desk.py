"""Samples between the log and who draws them: admit, step, hand over the answers.

An engine's decode loop draws them, or a vLLM server where there is one for the base model; what that does not draw
the engine does.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from gpuworker import device_loss, payloads, suspicion
from gpuworker.cold_weights import ColdWeights, Found
from gpuworker.committer import Committer
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import CheckpointError, EngineError, OutOfMemory
from gpuworker.engine.sampling import Sampler
from gpuworker.engine.types import SampleRequest, SampleResult
from gpuworker.outcomes import SampleOutcome
from gpuworker.partials import Partials
from gpuworker.sample_turns import SampleTurns
from gpuworker.snapshots import StorageError
from gpuworker.vllm_sampler import VllmSampler
from gpuworker.vllm_wire import Refusal
from runs.schemas.sampling import StoredSample
from runs.services import claims
from runs.services.commits import Result
from runs.services.sample_claims import TakenSample
from runs.threads import until_reachable

logger = logging.getLogger(__name__)

MAX_SAMPLERS: Final = 64
PARTIALS_S: Final = 0.1


@dataclass
class _Open:
    """A request that is being drawn; `num_shown` tokens of one that is watched are on their way to its page."""

    sampler: Sampler | VllmSampler
    taken: TakenSample
    num_prompt_logprobs: int | None
    is_watched: bool
    num_shown: int = 0


class SampleDesk:
    """Keeps the decode loops fed; used by the compute stage alone.

    Args:
        wake: called from another thread when there is something to do here again.
        put_off: lets a request go, to come again when what is stored of it may be readable.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        committer: Committer,
        servers: Mapping[str, VllmSampler],
        *,
        wake: Callable[[], None],
        put_off: Callable[[int], None],
    ) -> None:
        self._engines = engines
        self._servers = servers
        self._committer = committer
        self._put_off = put_off
        self._waiting: dict[str, SampleTurns] = defaultdict(SampleTurns)
        self._cold = ColdWeights(unwritten=lambda: committer.unwritten, on_read=wake)
        self._cold_requests: dict[str, list[TakenSample]] = defaultdict(list)
        self._engines_own: set[int] = set()  # requests that no server is asked to draw
        self._lone: set[int] = set()  # requests that failed together, to be drawn one at a time
        self._open: dict[int, _Open] = {}
        self._alone: int | None = None
        self._partials = Partials()
        self._watched: dict[int, int] = {}  # in which session a request is whose page is shown its tokens
        self._shown_at = 0.0
        self._used: OrderedDict[tuple[str, str], None] = OrderedDict()

    @property
    def has_work(self) -> bool:
        """Whether there is something to do here; what waits for servers to end, to be tried alone, is not."""
        if self._cold.has_read or any(engine.sampler.num_pending for engine in self._engines.values()):
            return True
        return any(self._waiting.values()) and not self.is_waiting and self._alone is None

    @property
    def is_waiting(self) -> bool:
        """Whether a server has a request to draw, which `tend` takes over once it has ended."""
        return any(server.num_pending for server in self._servers.values())

    @property
    def is_trying_alone(self) -> bool:
        """Whether a request is open that nothing, no training either, may be computed beside."""
        return self._alone in self._open

    def admit(self, taken: TakenSample) -> None:
        """Put a request into its model's decode loop in its turn, or answer it with its error."""
        self._waiting[taken.base_model].put(taken)
        self._admit_waiting()

    def stop(self) -> None:
        """Show no more of what is drawn, and read no more weights."""
        self._partials.stop()
        self._cold.stop()

    def note_kept(self, base_model: str, directory: str) -> None:
        """Count weights that a save has left in the engine, so that they are let go in their turn."""
        self._used[base_model, directory] = None
        self._evict()

    def step(self) -> None:
        """Advance every unfinished sequence by one token and hand over what is complete."""
        self.tend()
        self._take_read()
        self._admit_waiting()
        for engine in self._engines.values():
            if engine.sampler.num_pending:
                self._step(engine)

    def tend(self) -> None:
        """Stop what is not wanted any more, take over what servers have drawn, and show what is watched."""
        self._drop_ended()
        for server in self._servers.values():
            self._collect(server)
        if self._watched and time.monotonic() - self._shown_at >= PARTIALS_S:
            self._shown_at = time.monotonic()
            self._show()

    def _admit_waiting(self) -> None:
        """Begin what waits, a request of each owner at a time, as long as what begins is drawn at once.

        Nothing begins either while the weights are read of what is to be tried alone.
        """
        while self._alone is None and (turns := self._next_turns()) is not None:
            self._begin(turns.pop())

    def _next_turns(self) -> SampleTurns | None:
        """Return where the next request waits; one whose workers died begins once nothing else is open, and alone."""
        waiting = {name: turns for name, turns in self._waiting.items() if turns}
        suspicious = next((one for one in waiting.values() if suspicion.is_suspicious(one.head)), None)
        if suspicious is not None:
            return None if self._open else suspicious
        may_begin = (
            turns for name, turns in waiting.items() if self._has_room(self._engines[name], turns.head)
        )
        return next(may_begin, None)

    def _has_room(self, engine: Engine, head: TakenSample) -> bool:
        """Say whether an engine has slots left: what it is handed beyond them stands before everybody who comes later.

        A request that is to be drawn by itself has all of them or none.
        """
        own = self._open_in(engine)
        if head.pk in self._lone or any(one.taken.pk in self._lone for one in own):
            return not own
        sampler = engine.sampler
        return sampler.num_wanted < engine.num_slots and not sampler.has_left_out

    def _open_in(self, engine: Engine) -> list[_Open]:
        return [one for one in self._open.values() if one.sampler is engine.sampler]

    def _begin(self, taken: TakenSample) -> None:
        engine = self._engines[taken.base_model]
        try:
            if suspicion.is_poison(taken):
                logger.error("sample %s is given up", taken.pk)
                raise suspicion.given_up(taken)
            if suspicion.is_suspicious(taken):
                self._note_alone(taken)
            body = payloads.read_sample(taken)
            request = payloads.sample_request(taken, body, max_context=engine.max_context)
            server = self._server_for(taken, request)
            if server is None and not self._has_weights(engine, taken):
                self._wait_for_weights(taken)
                return
            if server is None:
                engine.sampler.submit(request)
            else:
                server.submit(request, is_watched=body.stream)
        except Exception as error:  # noqa: BLE001 - it is the request's answer
            self._refuse(taken, error)
        else:
            self._note_open(taken, body, server or engine.sampler)

    def _refuse(self, taken: TakenSample, error: Exception) -> None:
        """Answer a request that cannot be begun."""
        device_loss.end_if_lost(error)
        if isinstance(error, EngineError):
            self._answer(taken.pk, payloads.error_result(error))
            return
        logger.error("sample %s could not be begun", taken.pk, exc_info=error)
        self._answer(taken.pk, _failure(error))

    def _server_for(self, taken: TakenSample, request: SampleRequest) -> VllmSampler | None:
        """Return who is asked first, if anybody: what ended workers is tried here, and alone."""
        server = self._servers.get(taken.base_model)
        if server is None or taken.is_lost or suspicion.is_suspicious(taken):
            return None
        if taken.pk in self._engines_own or not server.accepts(request):
            return None
        if taken.checkpoint_directory:
            self._note_used(taken.base_model, taken.checkpoint_directory)
        return server

    def _note_alone(self, taken: TakenSample) -> None:
        """Enter, before it can end this worker too, that a request is tried alone; what was computed is kept first.

        One whose weights were read since is entered already.
        """
        if self._alone == taken.pk:
            return
        self._committer.flush()
        until_reachable(partial(claims.count_lone_attempt, taken.pk))
        self._alone = taken.pk

    def _note_open(self, taken: TakenSample, body: StoredSample, sampler: Sampler | VllmSampler) -> None:
        self._open[taken.pk] = _Open(
            sampler=sampler,
            taken=taken,
            num_prompt_logprobs=body.prompt_logprobs_last_n,
            is_watched=body.stream,
        )
        if body.stream and taken.pk not in self._watched:
            self._watched[taken.pk] = taken.session_pk
            self._partials.open(taken.pk)

    def _show(self) -> None:
        for operation_pk, one in self._open.items():
            if one.is_watched:
                tokens = one.sampler.tokens_of(str(operation_pk), start=one.num_shown)
                if tokens:
                    self._partials.put(one.taken.session_pk, operation_pk, one.num_shown, tokens)
                    one.num_shown += len(tokens)

    def _drop_ended(self) -> None:
        """Draw no further tokens of samples that were stopped by the person who asked for them."""
        for operation_pk in self._partials.pop_ended():
            one = self._open.get(operation_pk)
            if one is not None:
                one.sampler.cancel(str(operation_pk))
                self._answer(operation_pk, Result(error="stopped", category="user"))

    def _step(self, engine: Engine) -> None:
        try:
            outcomes = engine.sampler.step()
        except Exception as error:
            device_loss.end_if_lost(error)
            logger.exception("a decode step failed")
            self._part(engine, error)
            return
        without_room = [
            int(request_id) for request_id, outcome in outcomes if isinstance(outcome, OutOfMemory)
        ]
        for request_id, outcome in outcomes:
            if len(without_room) > 1 and int(request_id) in without_room:
                self._draw_alone(int(request_id))
                continue
            answer = payloads.error_result(outcome) if isinstance(outcome, EngineError) else outcome
            self._answer(int(request_id), answer)

    def _part(self, engine: Engine, error: Exception) -> None:
        """Answer a request that failed by itself; those that failed together are drawn anew, one at a time."""
        own = self._open_in(engine)
        for one in own:
            engine.sampler.cancel(str(one.taken.pk))
            if len(own) == 1:
                self._answer(one.taken.pk, _failure(error))
            else:
                self._draw_alone(one.taken.pk)

    def _draw_alone(self, operation_pk: int) -> None:
        """Have a request drawn anew with no other beside it: its tokens depend on its seed alone."""
        one = self._open.pop(operation_pk)
        self._lone.add(operation_pk)
        self._waiting[one.taken.base_model].put(one.taken)

    def _collect(self, server: VllmSampler) -> None:
        for request_id, outcome in server.step():
            if isinstance(outcome, Refusal):
                refused = self._open.pop(int(request_id))
                self._engines_own.add(refused.taken.pk)
                self._begin(refused.taken)
            else:
                self._answer(int(request_id), outcome)

    def _answer(self, operation_pk: int, answer: SampleResult | Result) -> None:
        one = self._open.get(operation_pk)
        session_pk = self._watched.get(operation_pk)
        self._forget(operation_pk)
        wanted = one.num_prompt_logprobs if one is not None else None
        self._committer.put(
            SampleOutcome(operation_pk=operation_pk, answer=answer, num_prompt_logprobs=wanted)
        )
        if session_pk is not None:
            self._partials.close(session_pk, operation_pk)

    def _forget(self, operation_pk: int) -> None:
        """Keep nothing of a request; when it comes again it is as new."""
        if self._alone == operation_pk:
            self._alone = None
        self._open.pop(operation_pk, None)
        self._watched.pop(operation_pk, None)
        self._engines_own.discard(operation_pk)
        self._lone.discard(operation_pk)

    def _has_weights(self, engine: Engine, taken: TakenSample) -> bool:
        """Say whether the engine holds what a request is drawn with, and count it as used."""
        if taken.is_lost:
            raise CheckpointError("the weights of this sampling session were deleted")
        directory = taken.checkpoint_directory
        if not directory:
            return True
        if not engine.use_sampler(directory):
            return False
        self._note_used(taken.base_model, directory)
        return True

    def _wait_for_weights(self, taken: TakenSample) -> None:
        """Have a request's weights read; it begins in its turn when they are here."""
        self._engines_own.add(taken.pk)
        self._cold_requests[taken.checkpoint_directory].append(taken)
        self._cold.want(taken.checkpoint_directory)

    def _take_read(self) -> None:
        """Hand weights that were read to the engine, and let the requests that wait for them begin in their turn."""
        for directory, found in self._cold.pop().items():
            requests = self._cold_requests.pop(directory)
            try:
                self._hold(requests[0].base_model, directory, found)
            except StorageError as error:
                logger.warning("%s samples wait for storage: %s", len(requests), error)
                for taken in requests:
                    self._forget(taken.pk)
                    self._put_off(taken.pk)
            except Exception as error:  # noqa: BLE001 - it is the requests' answer
                for taken in requests:
                    self._refuse(taken, error)
            else:
                for taken in requests:
                    if taken.pk == self._alone:
                        self._begin(taken)
                    else:
                        self._waiting[taken.base_model].put(taken)

    def _hold(self, base_model: str, directory: str, found: Found) -> None:
        if isinstance(found, Exception):
            raise found
        self._engines[base_model].load_sampler(directory, found)
        self._note_used(base_model, directory)

    def _note_used(self, base_model: str, directory: str) -> None:
        self._used[base_model, directory] = None
        self._used.move_to_end((base_model, directory))
        self._evict()

    def _evict(self) -> None:
        """Let the least recently used weights go; sequences being decoded keep theirs in the engine."""
        while len(self._used) > MAX_SAMPLERS:
            (base_model, directory), _ = self._used.popitem(last=False)
            self._engines[base_model].drop_sampler(directory)
            if base_model in self._servers:
                self._servers[base_model].drop(directory)


def _failure(error: Exception) -> Result:
    return Result(error=f"the engine failed: {type(error).__name__}", category="server")
