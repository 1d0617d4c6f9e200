"""Samples between the log and the engines' decode loops: admit, step, hand over the answers."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from gpuworker import payloads, snapshots, suspicion
from gpuworker.committer import Committer, SampleOutcome
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import CheckpointError, EngineError
from gpuworker.engine.types import SampleResult
from gpuworker.partials import Partials
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
    """A request in a decode loop; `num_shown` tokens of one that is watched are on their way to its page."""

    engine: Engine
    session_pk: int
    num_prompt_logprobs: int | None
    is_watched: bool
    num_shown: int = 0


class SampleDesk:
    """Keeps the decode loops fed; used by the compute stage alone."""

    def __init__(self, engines: Mapping[str, Engine], committer: Committer) -> None:
        self._engines = engines
        self._committer = committer
        self._waiting: deque[TakenSample] = deque()
        self._open: dict[int, _Open] = {}
        self._alone: int | None = None
        self._partials = Partials()
        self._num_watched = 0
        self._shown_at = 0.0
        self._used: OrderedDict[tuple[str, str], None] = OrderedDict()

    @property
    def has_work(self) -> bool:
        """Whether any request has no answer yet."""
        return bool(self._waiting) or any(engine.sampler.num_pending for engine in self._engines.values())

    @property
    def is_trying_alone(self) -> bool:
        """Whether a request is open that nothing, no training either, may be computed beside."""
        return self._alone in self._open

    def admit(self, taken: TakenSample) -> None:
        """Put a request into its model's decode loop in its turn, or answer it with its error."""
        self._waiting.append(taken)
        self._admit_waiting()

    def note_kept(self, base_model: str, directory: str) -> None:
        """Count weights that a save has left in the engine, so that they are let go in their turn."""
        self._used[base_model, directory] = None
        self._evict()

    def step(self) -> None:
        """Advance every unfinished sequence by one token and hand over what is complete."""
        self._drop_ended()
        self._admit_waiting()
        for engine in self._engines.values():
            if engine.sampler.num_pending:
                self._step(engine)
        if self._num_watched and time.monotonic() - self._shown_at >= PARTIALS_S:
            self._shown_at = time.monotonic()
            self._show()

    def _admit_waiting(self) -> None:
        """Begin what waits in order; one whose workers died begins once nothing else is open, and alone."""
        while self._waiting and not self.is_trying_alone:
            if suspicion.is_suspicious(self._waiting[0]) and self._open:
                return
            self._begin(self._waiting.popleft())

    def _begin(self, taken: TakenSample) -> None:
        engine = self._engines[taken.base_model]
        try:
            if suspicion.is_poison(taken):
                logger.error("sample %s is given up", taken.pk)
                raise suspicion.given_up(taken)
            if suspicion.is_suspicious(taken):
                self._note_alone(taken)
            body = payloads.read_sample(taken)
            self._ensure_sampler(engine, taken)
            engine.sampler.submit(payloads.sample_request(taken, body, max_context=engine.max_context))
        except EngineError as error:
            self._answer(taken.pk, payloads.error_result(error))
        except Exception as error:
            logger.exception("sample %s could not be begun", taken.pk)
            self._answer(taken.pk, _failure(error))
        else:
            self._note_open(taken, body, engine)

    def _note_alone(self, taken: TakenSample) -> None:
        """Enter, before it can end this worker too, that a request is tried alone; what was computed is kept first."""
        self._committer.flush()
        until_reachable(partial(claims.count_lone_attempt, taken.pk))
        self._alone = taken.pk

    def _note_open(self, taken: TakenSample, body: StoredSample, engine: Engine) -> None:
        self._open[taken.pk] = _Open(
            engine=engine,
            session_pk=taken.session_pk,
            num_prompt_logprobs=body.prompt_logprobs_last_n,
            is_watched=body.stream,
        )
        if body.stream:
            self._num_watched += 1
            self._partials.open(taken.pk)

    def _show(self) -> None:
        for operation_pk, one in self._open.items():
            if one.is_watched:
                tokens = one.engine.sampler.tokens_of(str(operation_pk), start=one.num_shown)
                if tokens:
                    self._partials.put(one.session_pk, operation_pk, one.num_shown, tokens)
                    one.num_shown += len(tokens)

    def _drop_ended(self) -> None:
        """Draw no further tokens of samples that were stopped by the person who asked for them."""
        for operation_pk in self._partials.pop_ended():
            one = self._open.get(operation_pk)
            if one is not None:
                one.engine.sampler.cancel(str(operation_pk))
                self._answer(operation_pk, Result(error="stopped", category="user"))

    def _step(self, engine: Engine) -> None:
        try:
            outcomes = engine.sampler.step()
        except Exception as error:
            logger.exception("a decode step failed; its requests fail with it")
            for operation_pk in [pk for pk, one in self._open.items() if one.engine is engine]:
                engine.sampler.cancel(str(operation_pk))
                self._answer(operation_pk, _failure(error))
            return
        for request_id, outcome in outcomes:
            answer = payloads.error_result(outcome) if isinstance(outcome, EngineError) else outcome
            self._answer(int(request_id), answer)

    def _answer(self, operation_pk: int, answer: SampleResult | Result) -> None:
        one = self._open.pop(operation_pk, None)
        wanted = one.num_prompt_logprobs if one is not None else None
        self._committer.put(
            SampleOutcome(operation_pk=operation_pk, answer=answer, num_prompt_logprobs=wanted)
        )
        if one is not None and one.is_watched:
            self._num_watched -= 1
            self._partials.close(one.session_pk, operation_pk)

    def _ensure_sampler(self, engine: Engine, taken: TakenSample) -> None:
        if taken.is_lost:
            raise CheckpointError("the weights of this sampling session were deleted")
        directory = taken.checkpoint_directory
        if not directory:
            return
        key = (taken.base_model, directory)
        if not engine.use_sampler(directory):
            if directory in self._committer.unwritten:
                self._committer.flush()
            engine.load_sampler(directory, snapshots.fetch(directory))
        self._used[key] = None
        self._used.move_to_end(key)
        self._evict()

    def _evict(self) -> None:
        """Let the least recently used weights go; sequences being decoded keep theirs in the engine."""
        while len(self._used) > MAX_SAMPLERS:
            (base_model, directory), _ = self._used.popitem(last=False)
            self._engines[base_model].drop_sampler(directory)


def _failure(error: Exception) -> Result:
    return Result(error=f"the engine failed: {type(error).__name__}", category="server")
