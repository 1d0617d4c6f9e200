"""The first of the three stages: claim runs, take their next operations, decode them ahead of compute.

Woken by NOTIFY, by compute when it has made room, and by itself every second, so that a lost
doorbell or a dead Redis costs no more than that.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import psycopg
from django.db import DatabaseError, InterfaceError, close_old_connections

from gpuworker import payloads
from gpuworker.engine.engine import Engine
from gpuworker.sample_intake import SampleIntake
from gpuworker.seats import PreparedOperation, PutOff, Seat
from gpuworker.snapshots import StorageError
from runs import events
from runs.models import Worker
from runs.services import claims, holdups, placement, workers
from runs.services.claims import HeldRun, TakenOperation
from runs.services.operations import GAP_PATIENCE_S
from runs.services.sample_claims import TakenSample
from runs.threads import database_thread

logger = logging.getLogger(__name__)

SWEEP_S: Final = 1.0
AHEAD: Final = 6
# Operations of all runs together are decoded ahead up to so many tokens, some 50 MB.
AHEAD_TOKENS: Final = 1_000_000
# A run stays with a worker for so long at least before it is given to another, and so many go at a time.
SETTLE_S: Final = 30.0
MAX_MOVES: Final = 8
# How long it may go unnoticed that another worker came: a look costs every waiting client a round trip.
_LOOK_S: Final = 0.25


class Intake:
    """Fills the seats' queues and the list of samples; `ready` is set when compute has something to do.

    `may_judge` says whether this worker may find others dead.
    """

    def __init__(
        self,
        worker: Worker,
        engines: Mapping[str, Engine],
        *,
        unwritten: Callable[[], Collection[str]] = list,
        may_judge: Callable[[], bool] = lambda: True,
    ) -> None:
        self.ready = threading.Event()
        self.seats: dict[int, Seat] = {}
        self.samples = SampleIntake(worker, engines, unwritten=unwritten)
        self._has_company = False
        self._is_drained = False
        self._looked_at = 0.0
        self._troubled_at = -math.inf
        self._worker = worker
        self._engines = engines
        self._may_judge = may_judge
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            database_thread("intake", self._loop),
            database_thread("doorbell", self._listen),
        ]

    def start(self) -> None:
        """Begin to look for work."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Take nothing more."""
        self._stopping.set()
        self._wake.set()
        for thread in self._threads:
            thread.join()

    def wake(self) -> None:
        """Look for work now: there is room for more."""
        self._wake.set()

    def drop(self, seat: Seat) -> None:
        """Forget a seat; its run may be claimed again."""
        with self._lock:
            if self.seats.get(seat.run.pk) is seat:
                del self.seats[seat.run.pk]

    def pop_samples(self) -> list[TakenSample]:
        """Return the sample requests taken since the last call."""
        taken = self.samples.pop()
        if taken:
            self._wake.set()
        return taken

    def end_sample(self, operation_pk: int) -> None:
        """Note that a sample has its answer, or is to be taken again."""
        if self.samples.end(operation_pk):
            self._wake.set()

    def _loop(self) -> None:
        last_sweep = 0.0
        while not self._stopping.is_set():
            self._wake.wait(SWEEP_S)
            self._wake.clear()
            try:
                if time.monotonic() - last_sweep > SWEEP_S:
                    if self._may_find_dead:
                        workers.bury_dead(sparing=self._worker)
                    self._give_up_deleted()
                    self._balance()
                    self._claim_owing()
                    last_sweep = time.monotonic()
                self._collect()
            except (DatabaseError, InterfaceError, psycopg.Error) as error:
                self._troubled_at = time.monotonic()
                close_old_connections()
                logger.warning("no work can be taken, the database does not answer: %s", error)
                time.sleep(0.5)

    @property
    def _may_find_dead(self) -> bool:
        """Whether the database is there for so long, as far as intake knows, too, that others must have found it again."""
        return self._may_judge() and time.monotonic() - self._troubled_at > workers.RETURN_GRACE_S

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                with psycopg.connect(**events.direct_parameters(), autocommit=True) as held:
                    held.execute(f"LISTEN {events.WORK_CHANNEL}")
                    self._wake.set()
                    while not self._stopping.is_set():
                        for _ in held.notifies(timeout=SWEEP_S, stop_after=1):
                            self._wake.set()
            except psycopg.Error as error:
                logger.warning("the doorbell is silent, the database does not answer: %s", error)
                time.sleep(1.0)

    def _collect(self) -> None:
        self._look()
        with self._lock:
            held = list(self.seats)
        self._seat(self._claim(held))
        self._take()
        self.samples.give_back()
        if not self._is_drained and self.samples.take():
            self.ready.set()

    def _seat(self, runs: Sequence[HeldRun]) -> None:
        for run in runs:
            with self._lock:
                self.seats[run.pk] = Seat(run, self._engines[run.base_model])

    def _claim_owing(self) -> None:
        """Take runs whose former worker died over a file that it had promised."""
        with self._lock:
            held = list(self.seats)
        self._seat(claims.claim_owing(self._worker, list(self._engines), held=held))

    def _take(self) -> None:
        """Take the next operations of all runs, as many as may be decoded ahead of compute."""
        open_seats, num_tokens = self._room()
        taken_seqs = {seat.run.pk: seat.taken_seq for seat in open_seats}
        waiting = {seat.run.pk: seat.waiting_tokens for seat in open_seats if seat.queue}
        taken = claims.take_operations(
            self._worker, taken_seqs, limit=AHEAD, max_tokens=num_tokens, waiting=waiting
        )
        self._fill(taken)
        if sum(operation.num_tokens for operation in taken) >= num_tokens:
            for seat in open_seats:
                seat.may_have_more = True

    def _look(self) -> None:
        """See now and then who else is there, and whether an operator wants this worker empty."""
        if time.monotonic() - self._looked_at <= _LOOK_S:
            return
        found = placement.look(self._worker, list(self._engines))
        self._looked_at = time.monotonic()
        self._has_company, self._is_drained = found.has_company, found.is_drained
        if found.is_drained:
            with self._lock:
                seats = list(self.seats.values())
            self._let_leave(seats)

    def _claim(self, held: Sequence[int]) -> list[HeldRun]:
        """Take free runs: all, or beside other workers a fair share and what nobody else wants."""
        served = list(self._engines)
        if self._is_drained:
            return []
        if not self._has_company:
            return claims.claim_runs(self._worker, served, held=held)
        runs: list[HeldRun] = []
        for base_model in placement.wanted(served):
            room = placement.loads(self._worker, base_model).room
            runs += claims.claim_runs(self._worker, [base_model], held=_with(held, runs), limit=room)
        patience_s = placement.PATIENCE_S
        return runs + claims.claim_runs(self._worker, served, held=_with(held, runs), waited_s=patience_s)

    def _balance(self) -> None:
        """Let runs go to a worker that has clearly fewer: active ones, which count, of those that are settled here."""
        if not self._has_company:
            return
        with self._lock:
            seats = list(self.seats.values())
        for base_model in self._engines:
            surplus = placement.loads(self._worker, base_model).surplus
            self._move(min(surplus, MAX_MOVES), [seat for seat in seats if seat.run.base_model == base_model])

    def _move(self, number: int, seats: Sequence[Seat]) -> None:
        """Let so many of the seats leave, with those that are about to."""
        settled = time.monotonic() - SETTLE_S
        staying = [seat for seat in seats if not (seat.is_leaving or seat.is_lost)]
        number -= sum(seat.is_leaving for seat in seats)
        movable = [seat for seat in staying if seat.claimed_at < settled]
        self._let_leave(sorted(movable, key=lambda seat: seat.last_used_at, reverse=True)[: max(number, 0)])

    def _let_leave(self, seats: Sequence[Seat]) -> None:
        """Have compute let go of runs at the next operation boundary, each with its state kept."""
        for seat in seats:
            seat.is_leaving = True
            self.ready.set()

    def _give_up_deleted(self) -> None:
        """Let compute free what it holds of runs that people have deleted."""
        with self._lock:
            seats = dict(self.seats)
        missing = claims.missing_among(seats) if seats else set()
        for pk in missing:
            seats[pk].is_lost = True
        if missing:
            self.ready.set()

    def _room(self) -> tuple[list[Seat], int]:
        """Return who may have further operations decoded, and how many tokens they may have together.

        What waits of runs that cannot be brought back just now takes no room from others.
        """
        with self._lock:
            seats = list(self.seats.values())
        num_tokens = sum(seat.waiting_tokens for seat in seats if not seat.restoring.pause_s)
        for seat in seats:
            has_enough = bool(seat.queue) and num_tokens >= AHEAD_TOKENS
            seat.may_have_more = has_enough or len(seat.queue) >= AHEAD
        open_seats = [seat for seat in seats if seat.may_be_filled and not seat.may_have_more]
        return open_seats, AHEAD_TOKENS - num_tokens

    def _fill(self, taken: Sequence[TakenOperation]) -> None:
        waiting: set[int] = set()
        counts = Counter(operation.run_pk for operation in taken)
        for operation in taken:
            seat = self.seats.get(operation.run_pk)
            if seat is None or operation.run_pk in waiting:
                continue
            seat.may_have_more = counts[operation.run_pk] >= AHEAD
            for skipped in self._gap_before(seat, operation):
                self._append(seat, skipped)
            if operation.seq != seat.taken_seq + 1:
                waiting.add(operation.run_pk)
                continue
            prepared = self._read(seat, operation)
            if prepared is None:
                waiting.add(operation.run_pk)
                continue
            self._append(seat, prepared)

    def _read(self, seat: Seat, operation: TakenOperation) -> PreparedOperation | None:
        """Return an operation decoded; one that cannot be read just now stays queued and is tried again later."""
        try:
            prepared = payloads.prepare(operation, seat.adapter_id)
        except StorageError as error:
            logger.warning("run %s waits, trying again: %s", seat.run.public_id, error)
            seat.reading.again()
            seat.reading.reason = holdups.unread(str(error))
            holdups.enter(seat.run.pk, seat.reading.reason)
            return None
        if seat.reading.reason:
            holdups.clear(seat.run.pk, seat.reading.reason)
            seat.reading = PutOff()
        return prepared

    def _gap_before(self, seat: Seat, operation: TakenOperation) -> list[PreparedOperation]:
        """Return stand-ins for seqs that never came, once the first later one has waited long enough."""
        missing = range(seat.taken_seq + 1, operation.seq)
        if not missing or operation.waited_s < GAP_PATIENCE_S:
            return []
        return [payloads.skipped(seq) for seq in missing]

    def _append(self, seat: Seat, prepared: PreparedOperation) -> None:
        seat.taken_seq = prepared.seq
        seat.queue.append(prepared)
        self.ready.set()


def _with(held: Sequence[int], runs: Sequence[HeldRun]) -> list[int]:
    return [*held, *(run.pk for run in runs)]
