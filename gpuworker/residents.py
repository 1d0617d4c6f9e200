"""Which held runs have their adapters in memory, and which are shelved: kept on the disk until their turn.

A shelved run keeps its seat; its state is its newest snapshot, or stays in memory where that cannot be written. Used
by the compute stage alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Final

from gpuworker import device_loss, snapshots
from gpuworker.busy import BusyMeter
from gpuworker.committer import Committer
from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import CheckpointError, OutOfMemory
from gpuworker.engine.memory import is_out_of_memory
from gpuworker.outcomes import SnapshotOutcome
from gpuworker.restore import restore
from gpuworker.seats import PutOff, Seat
from gpuworker.snapshots import StorageError
from runs.services import holdups, restores
from runs.threads import until_reachable

logger = logging.getLogger(__name__)

# A cycle brings runs back for no longer than this (one at least), so that those in memory are not kept waiting.
RESTORE_S: Final = 0.25
# A run that has work keeps its place for so long while others wait for one.
TURN_S: Final = 2.0


class Residents:
    """Brings runs into memory and shelves them, the least recently used first."""

    def __init__(self, committer: Committer, busy: BusyMeter) -> None:
        self._committer = committer
        self._busy = busy

    def usable(self, seats: Sequence[Seat]) -> list[Seat]:
        """Return the seats with work whose adapters are in memory; some that waited longest are brought back."""
        waiting = [seat for seat in seats if seat.has_work and not seat.is_restored]
        until = time.monotonic() + RESTORE_S
        full: set[Engine] = set()
        for seat in sorted(waiting, key=lambda seat: seat.last_used_at):
            if seat.engine in full:
                continue
            if not self._has_made_room(seat, seats):
                full.add(seat.engine)
                continue
            self._bring_back(seat)
            if time.monotonic() > until:
                break
        return [seat for seat in seats if seat.has_work and seat.is_restored]

    def snapshot(self, seat: Seat) -> None:
        """Keep the state after the last applied operation, unless it is kept; it becomes a row after its commit."""
        if seat.applied_seq <= seat.snapshot_seq:
            return
        if seat.unwritten is not None:
            self._put(seat, seat.unwritten, copy_s=0.0)
        elif seat.engine.has_adapter(seat.adapter_id):
            began = time.monotonic()
            state = seat.engine.export_state(seat.adapter_id, optimizer=True, gradients=True)
            self._put(seat, state, copy_s=time.monotonic() - began)

    def _put(self, seat: Seat, state: AdapterState, *, copy_s: float) -> None:
        seat.replay_cost_s, seat.snapshot_cost_s = 0.0, math.inf  # what it costs is known once it is written
        self._committer.put(SnapshotOutcome(seat=seat, seq=seat.applied_seq, state=state, copy_s=copy_s))

    def _has_made_room(self, wanted: Seat, seats: Sequence[Seat]) -> bool:
        """Make room for a seat; one for which the storage has to take the states of others first is put off."""
        try:
            return self._make_room(wanted, seats)
        except StorageError as error:
            _put_back(wanted, error)
            return False

    def _make_room(self, wanted: Seat, seats: Sequence[Seat]) -> bool:
        """Shelve others until the seat fits; false while they have a right to stay. One alone always fits."""
        engine = wanted.engine
        inside = [seat for seat in seats if seat.engine is engine and seat.takes_room]
        excess = sum(seat.num_bytes for seat in [*inside, wanted]) - engine.adapter_room_bytes
        ended = time.monotonic() - TURN_S
        leaving: list[Seat] = []
        for seat in sorted(inside, key=lambda seat: (bool(seat.queue), seat.last_used_at)):
            if excess <= 0:
                break
            if not seat.queue or seat.restored_at < ended:
                leaving.append(seat)
                excess -= seat.num_bytes
        if excess > 0 and len(leaving) < len(inside):
            return False
        if leaving and wanted.unwritten is None:  # else as much memory becomes free as may be taken
            self._write_again(seats)
        for seat in leaving:
            self._shelve(seat)
        return True

    def _write_again(self, seats: Sequence[Seat]) -> None:
        """Write the states that the storage did not take when their runs were shelved: memory has no room for more.

        Raises:
            StorageError: it does not take them now either.
        """
        for seat in seats:
            if seat.unwritten is not None:
                self.snapshot(seat)
                self._committer.flush()
                if seat.unwritten is not None:
                    raise StorageError("the states of other runs, which make room for it, cannot be written")

    def _shelve(self, seat: Seat) -> None:
        """Keep the state and free its memory; a run without an adapter yet starts over."""
        seat.is_restored = False
        seat.is_shelved = seat.engine.has_adapter(seat.adapter_id)
        if not seat.is_shelved:
            return
        self.snapshot(seat)
        seat.engine.drop_adapter(seat.adapter_id)

    def _bring_back(self, seat: Seat) -> None:
        """Bring a run into memory; what keeps it out, the storage or the memory for one, may pass: it is tried again."""
        try:
            if seat.is_shelved:
                self._take_back(seat)
            else:
                self._restore(seat)
        except (StorageError, OutOfMemory) as error:
            _put_back(seat, error)
        except Exception as error:
            if not is_out_of_memory(error):
                logger.exception("run %s cannot be brought back", seat.run.public_id)
            _put_back(seat, error)
        else:
            let_on(seat)
            seat.restored_at = time.monotonic()

    def _restore(self, seat: Seat) -> None:
        until_reachable(partial(restores.begin, seat.run))
        try:
            with device_loss.noticed():  # here, so that the try stays counted
                until_reachable(partial(restore, seat, beat=self._busy.beat))
        finally:
            until_reachable(partial(restores.end, seat.run))

    def _take_back(self, seat: Seat) -> None:
        """Read the state back; a run whose state is damaged is claimed anew and rebuilt from the log."""
        if seat.snapshot_seq < seat.applied_seq:
            self._committer.flush()
        self._busy.beat()
        try:
            seat.engine.import_state(seat.adapter_id, _shelved_state(seat), optimizer=True)
        except CheckpointError as error:
            logger.warning("the state of shelved run %s cannot be used: %s", seat.run.public_id, error)
            seat.is_lost = True
            return
        seat.is_restored = True
        seat.is_shelved = False
        seat.unwritten = None


def put_off(seat: Seat, error: Exception, reason: str) -> None:
    """Let some time pass before the run's next operation is tried again, and tell people why."""
    seat.restoring.again()
    seat.restoring.reason = reason
    until_reachable(partial(holdups.enter, seat.run.pk, reason))
    logger.warning(
        "run %s is put off, trying again in %.0f s: %s", seat.run.public_id, seat.restoring.pause_s, error
    )


def let_on(seat: Seat) -> None:
    """Note that what was tried again has succeeded."""
    if seat.restoring.pause_s:
        until_reachable(partial(holdups.clear, seat.run.pk, seat.restoring.reason))
        seat.restoring = PutOff()


def _shelved_state(seat: Seat) -> AdapterState:
    if seat.snapshot_seq >= seat.applied_seq:
        return snapshots.fetch(seat.snapshot_directory)
    if seat.unwritten is None:
        raise CheckpointError("it was not written")
    return seat.unwritten


def _put_back(seat: Seat, error: Exception) -> None:
    seat.engine.drop_adapter(seat.adapter_id)
    put_off(seat, error, holdups.put_off(_problem(error)))


def _problem(error: Exception) -> str:
    if isinstance(error, StorageError):
        return str(error)
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        return "the worker's memory has no room for the run"
    return f"the worker met an error of its own ({type(error).__name__}), which its log describes"
