"""The middle stage: what goes through the device next.

A cycle takes the operations at the head of every seat's queue: the forward_backwards of all runs on
one base model together, then the optimizer steps that follow them, then what goes alone (create,
load, save). Sampling gets the device between cycles, one decode step after another: each side has half of a
contended device (`device_share`) and all of an idle one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from gpuworker import device_loss, failpoints, handlers, suspicion
from gpuworker.busy import BusyMeter
from gpuworker.committer import Committer
from gpuworker.departures import Departures
from gpuworker.device_share import DeviceShare
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import CheckpointError, EngineError
from gpuworker.engine.memory import return_freed
from gpuworker.engine.types import ForwardBackward, OptimStep
from gpuworker.handlers import Outcome, Turn
from gpuworker.intake import AHEAD, Intake
from gpuworker.outcomes import RunOutcome, saved_bytes
from gpuworker.residents import Residents, let_on, put_off
from gpuworker.sample_desk import PARTIALS_S, SampleDesk
from gpuworker.seats import Create, Load, PreparedOperation, Save, Seat
from gpuworker.snapshots import StorageError
from gpuworker.turns import Turns
from gpuworker.vllm_sampler import VllmSampler
from runs.services import claims, holdups
from runs.threads import until_reachable

logger = logging.getLogger(__name__)

# A run's state is kept before its replay takes so long; sooner, so that the replays of all runs together take the
# second, as long as keeping states takes no more than such a share of the computing.
REPLAY_BUDGET_S: Final = 20.0
REPLAY_TOGETHER_S: Final = 4.0
SNAPSHOT_SHARE: Final = 0.02
IDLE_RELEASE_S: Final = 900.0
REST_S: Final = 60.0
"""After so long without work the worker keeps no memory for its next."""
_HOUSEKEEPING_S: Final = 5.0


class Scheduler:
    """Runs cycles; one thread at a time is inside `drain`."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        intake: Intake,
        committer: Committer,
        *,
        release: Callable[[Seat], None],
        busy: BusyMeter,
        servers: Mapping[str, VllmSampler] | None = None,
    ) -> None:
        self._engines = engines
        self._intake = intake
        self._committer = committer
        self._busy = busy
        self._desk = SampleDesk(
            engines,
            committer,
            {} if servers is None else servers,
            wake=intake.ready.set,
            put_off=intake.samples.put_off,
        )
        self._share = DeviceShare()
        self._turns = Turns()
        self._residents = Residents(committer, busy)
        self._departures = Departures(self._residents, committer, intake, release=release)
        self._draining = threading.Lock()
        self._tried_alone: set[int] = set()
        self._is_pausing = False
        self._is_stopping = False
        self._checked_at = time.monotonic()
        self._worked_at: float | None = None

    @property
    def is_draining(self) -> bool:
        """Whether some thread is at work."""
        return self._draining.locked()

    def drain(self, *, idle_s: float, slice_s: float) -> None:
        """Work until nothing came for `idle_s` or the slice is over; returns at once if another thread works."""
        if self._is_pausing or not self._draining.acquire(blocking=False):
            return
        try:
            self._drain(time.monotonic() + slice_s, idle_s)
        finally:
            self._draining.release()

    @property
    def has_work(self) -> bool:
        """Whether a slice would find something to do, if only to wait for what servers draw."""
        return self._can_compute or self._desk.is_waiting

    def tidy(self) -> None:
        """Let go of what idles, unless some thread is at work."""
        if self._draining.acquire(blocking=False):
            try:
                if not self._is_pausing:
                    self._tidy()
            finally:
                self._draining.release()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the running cycle end, and no other begin while inside: the engines are the caller's alone.

        Every run's state is kept before, so that `stop` can set the runs free meanwhile.
        """
        self._is_pausing = True
        self._intake.ready.set()
        try:
            with self._draining:
                for seat in list(self._intake.seats.values()):
                    self._departures.keep(seat)
                self._departures.are_engines_lent = True
            yield
        finally:
            self._is_pausing = self._departures.are_engines_lent = False
            self._intake.ready.set()

    def end_soon(self) -> None:
        """Begin no further cycle; `drain` returns once it has waited, if there is nothing to do.

        Safe in a signal handler: it takes no lock, as an event would, which the thread it interrupts may hold.
        """
        self._is_stopping = True

    def stop(self) -> None:
        """Let the running cycle end, keep every seat's state, and set the runs free."""
        self.end_soon()
        self._intake.ready.set()
        with self._draining:
            for seat in list(self._intake.seats.values()):
                self._departures.let_go(seat)
            self._committer.flush()
        self._desk.stop()

    def _drain(self, deadline: float, idle_s: float) -> None:
        while not (self._is_stopping or self._is_pausing) and time.monotonic() < deadline:
            if not self._wait(idle_s):
                return
            self._intake.ready.clear()
            with self._busy.measuring(), device_loss.noticed():
                self._work()
            self._worked_at = time.monotonic()
            self._tidy()

    def _wait(self, idle_s: float) -> bool:
        """Wait until there is something to do; false when nothing came and none is on its way from a server."""
        if self._can_compute:
            return True
        if self._desk.is_waiting:
            self._intake.ready.wait(PARTIALS_S)
            return True
        return self._intake.ready.wait(idle_s)

    def _work(self) -> None:
        """Run one cycle, then decode until sampling has its half; decode alone when there is nothing to train."""
        started_at = time.monotonic()
        has_trained = not self._desk.is_trying_alone and self._cycle()
        # Samples that came during the cycle are admitted now, so that one cycle is all they wait for.
        for taken in self._intake.pop_samples():
            self._desk.admit(taken)
        if self._desk.is_waiting:
            self._desk.tend()
        if has_trained:
            self._share.note_cycle(time.monotonic() - started_at)
            self._decode_while(lambda: self._share.is_samplings_turn)
        else:
            # Between two samples that are tried alone runs have a cycle.
            is_alone = self._desk.is_trying_alone
            self._decode_while(
                lambda: not self._intake.ready.is_set() and self._desk.is_trying_alone == is_alone
            )
            self._share.settle()
        if not self._desk.has_work:
            self._share.settle()

    def _decode_while(self, may_decode: Callable[[], bool]) -> None:
        while self._desk.has_work and may_decode() and not (self._is_stopping or self._is_pausing):
            started_at = time.monotonic()
            self._busy.beat()
            self._desk.step()
            self._share.note_step(time.monotonic() - started_at)

    @property
    def _can_compute(self) -> bool:
        return self._desk.has_work or self._intake.ready.is_set() or self._has_heads()

    def _has_heads(self) -> bool:
        return any(seat.has_work for seat in list(self._intake.seats.values()))

    # One cycle ----------------------------------------------------------------------------------

    def _cycle(self) -> bool:
        """Apply what the seats' heads allow; false when there was nothing."""
        seats = self._usable_seats()
        done: dict[int, list[Outcome]] = defaultdict(list)
        before = {seat.run.pk: seat.applied_seq for seat in seats}
        suspicious = next((seat for seat in seats if seat.head is not None and seat.head.is_suspicious), None)
        if suspicious is not None:
            self._apply_alone(suspicious, done)
            self._hand_over([suspicious] if done else [], done, before)
            return True
        lone = self._turns.pop_lone(seats)
        if lone is not None:
            self._apply_head(lone, done)
            self._hand_over([lone], done, before)
            return True
        self._apply_singles(seats, done)
        for engine in self._engines.values():
            own = [seat for seat in seats if seat.engine is engine]
            self._apply_together(self._turns.forward_backwards(own), handlers.forward_backwards, done)
            self._apply_together(self._turns.optim_steps(own), handlers.optim_steps, done)
        self._apply_singles(seats, done)
        if not done:
            return False
        by_run = {seat.run.pk: seat for seat in seats}
        self._hand_over([by_run[pk] for pk in done], done, before)  # in turn, which decides who is next
        return True

    def _usable_seats(self) -> list[Seat]:
        """Return the seats with work whose adapters are in memory."""
        seats = list(self._intake.seats.values())
        for seat in seats:
            if seat.is_lost:
                self._departures.forget(seat)
            elif seat.is_leaving or seat.is_suspect:
                self._departures.let_go(seat)
        gone = {seat for seat in seats if seat.is_lost or seat.is_leaving or seat.is_suspect}
        return self._residents.usable([seat for seat in seats if seat not in gone])

    def _apply_together(
        self,
        turns: list[Turn],
        handler: Callable[[Sequence[Turn]], list[Outcome]],
        done: dict[int, list[Outcome]],
    ) -> None:
        if not turns:
            return
        self._busy.beat()
        failpoints.reach("before_compute")
        try:
            outcomes = handler(turns)
        except Exception as error:
            device_loss.end_if_lost(error)
            logger.exception("a cycle of %s operations failed", len(turns))
            if len(turns) > 1:
                self._part(turns)
                return
            outcomes = [self._failed_badly(turn.seat, turn.operation, error) for turn in turns]
        for turn, outcome in zip(turns, outcomes, strict=True):
            turn.seat.advance(turn.operation)
            done[turn.seat.run.pk].append(outcome)

    def _part(self, turns: Sequence[Turn]) -> None:
        """Answer none of the operations: each goes by itself once its run is rebuilt from what was committed."""
        self._turns.part(turns)
        for turn in turns:
            turn.seat.is_suspect = True

    def _apply_singles(self, seats: Sequence[Seat], done: dict[int, list[Outcome]]) -> None:
        for seat in sorted(seats, key=lambda seat: seat.last_used_at):
            while (single := self._single_of(seat, done)) is not None:
                self._apply_single(seat, single, done)

    def _single_of(self, seat: Seat, done: Mapping[int, list[Outcome]]) -> PreparedOperation | None:
        """Return the seat's next operation if it goes alone, and may now."""
        head = seat.head
        if head is None or isinstance(head.request, ForwardBackward | OptimStep) or head.is_suspicious:
            return None
        waits = isinstance(head.request, Save) and self._is_full(done)
        return None if waits or seat.is_suspect or not seat.has_work else head

    def _is_full(self, done: Mapping[int, list[Outcome]]) -> bool:
        """Say whether further states are to be copied in the next cycle: when those of this one are being written."""
        return sum(saved_bytes(outcomes) for outcomes in done.values()) >= self._committer.state_bytes

    def _apply_single(self, seat: Seat, operation: PreparedOperation, done: dict[int, list[Outcome]]) -> None:
        """Apply what goes alone; later, where the checkpoint that it loads cannot be read just now."""
        self._busy.beat()
        failpoints.reach("before_compute")
        outcome = self._single(seat, operation)
        if isinstance(outcome.error, StorageError):
            put_off(seat, outcome.error, holdups.unread(str(outcome.error)))
            return
        let_on(seat)
        seat.advance(operation)
        done[seat.run.pk].append(outcome)
        request = operation.request
        if isinstance(request, Load) or (isinstance(request, Create) and request.load):
            seat.replay_cost_s = REPLAY_BUDGET_S

    def _single(self, seat: Seat, operation: PreparedOperation) -> Outcome:
        request = operation.request
        if isinstance(request, Save) and not request.overwrite and handlers.is_name_taken(seat, request):
            taken = CheckpointError(
                f"a checkpoint named {request.name!r} exists; choose another name or overwrite it"
            )
            return handlers.failed(seat, operation, taken)
        try:
            outcome = handlers.single(seat, operation)
        except Exception as error:
            device_loss.end_if_lost(error)
            logger.exception("an operation of run %s failed", seat.run.public_id)
            return self._failed_badly(seat, operation, error)
        if outcome.checkpoint is not None and isinstance(request, Save) and request.kind == "sampler_weights":
            self._desk.note_kept(seat.run.base_model, outcome.checkpoint.directory)
        return outcome

    def _apply_alone(self, seat: Seat, done: dict[int, list[Outcome]]) -> None:
        """Try an operation whose workers died with nothing beside it; one that ended them alone, too, fails."""
        operation = seat.head
        assert operation is not None
        assert operation.taken is not None
        if operation.is_poison:
            logger.error("operation %s of run %s is given up", operation.seq, seat.run.public_id)
            outcomes = [handlers.failed(seat, operation, suspicion.given_up(operation.taken))]
            seat.advance(operation)
            done[seat.run.pk] += outcomes
            return
        self._committer.flush()
        if operation.taken.pk not in self._tried_alone:  # else it waits for storage since
            self._tried_alone.add(operation.taken.pk)
            until_reachable(partial(claims.count_lone_attempt, operation.taken.pk))
        self._apply_head(seat, done)

    def _apply_head(self, seat: Seat, done: dict[int, list[Outcome]]) -> None:
        operation = seat.head
        assert operation is not None
        request = operation.request
        if isinstance(request, ForwardBackward):
            self._apply_together([Turn(seat, operation)], handlers.forward_backwards, done)
        elif isinstance(request, OptimStep):
            self._apply_together([Turn(seat, operation)], handlers.optim_steps, done)
        else:
            self._apply_single(seat, operation, done)

    def _failed_badly(self, seat: Seat, operation: PreparedOperation, error: Exception) -> Outcome:
        """Answer an operation that the engine did not expect to fail; what it left of the adapter is not trusted."""
        seat.is_suspect = True
        return handlers.failed(seat, operation, EngineError(f"the engine failed: {type(error).__name__}"))

    def _hand_over(
        self, seats: Sequence[Seat], done: Mapping[int, list[Outcome]], before: Mapping[int, int]
    ) -> None:
        failpoints.reach("after_compute")
        self._committer.put(
            [
                RunOutcome(seat=seat, from_seq=before[seat.run.pk], outcomes=done[seat.run.pk])
                for seat in seats
            ]
        )
        for seat in seats:
            seat.last_used_at = time.monotonic()
            if seat.is_closed or seat.is_suspect:
                self._committer.flush()
                self._departures.forget(seat)
                continue
            if self._is_snapshot_due(seat):
                self._residents.snapshot(seat)
            if seat.may_have_more and len(seat.queue) < AHEAD // 2:
                self._intake.wake()

    def _is_snapshot_due(self, seat: Seat) -> bool:
        soon_s = REPLAY_TOGETHER_S / len(self._intake.seats)
        return seat.replay_cost_s >= min(REPLAY_BUDGET_S, max(soon_s, seat.snapshot_cost_s / SNAPSHOT_SHARE))

    # Seats --------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Now and then: let go of runs that were idle for long, and of memory that is kept for more work."""
        now = time.monotonic()
        if now - self._checked_at < _HOUSEKEEPING_S:
            return
        self._checked_at = now
        for seat in list(self._intake.seats.values()):
            if seat.is_lost:
                self._departures.forget(seat)
            elif seat.is_leaving or (not seat.queue and now - seat.last_used_at > IDLE_RELEASE_S):
                self._departures.let_go(seat)
        if self._worked_at is not None and now - self._worked_at > REST_S:
            self._worked_at = None
            return_freed()
