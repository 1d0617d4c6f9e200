"""Bring a claimed run's adapter back: the newest good snapshot, then the operations after it once more.

Effects are not repeated: replayed results are only compared with the stored ones, and a difference is
entered as a `diverged` event.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from gpuworker import failpoints, handlers, payloads, snapshots
from gpuworker.engine.exceptions import CheckpointError, EngineError
from gpuworker.engine.types import ForwardBackward, ForwardBackwardResult, OptimStep
from gpuworker.handlers import Outcome, Turn
from gpuworker.seats import Consumed, PreparedOperation, Save, Seat
from runs.services import claims, commits
from runs.services.claims import TakenOperation
from runs.services.commits import Result

logger = logging.getLogger(__name__)

_TELL_S: Final = 0.25


def restore(seat: Seat, *, beat: Callable[[], None]) -> None:
    """Make the seat's engine state that after `applied_seq`; `beat` is called after each operation."""
    seat.engine.drop_adapter(seat.adapter_id)
    start_seq = _load_snapshot(seat)
    seat.snapshot_seq = start_seq
    if not claims.has_payloads_after(seat.run.pk, start_seq):
        _give_up(seat)
        return
    up_to_seq = seat.run.applied_seq
    progress = _Progress(seat, claims.count_applied(seat.run.pk, after_seq=start_seq, up_to_seq=up_to_seq))
    for taken in claims.applied_operations(seat.run.pk, after_seq=start_seq, up_to_seq=up_to_seq):
        _replay(seat, taken)
        failpoints.reach("during_replay")
        beat()
        progress.advance()
    progress.end()
    seat.step = seat.run.step
    seat.is_restored = True
    if seat.run.applied_seq >= 0:
        detail = {"from_seq": start_seq, "num_replayed": progress.num_replayed}
        commits.add_event(
            seat.run.pk, seq=seat.run.applied_seq, step=seat.step, kind="recovered", detail=detail
        )
        logger.info("run %s is back at operation %s", seat.run.public_id, seat.run.applied_seq)


def _give_up(seat: Seat) -> None:
    """Fail a run none of whose kept states can be read; its operations then fail one by one for want of an adapter."""
    error = "none of the run's kept states can be read, and the operations before them are deleted"
    logger.error("run %s is given up: %s", seat.run.public_id, error)
    commits.fail_run(seat.run.pk, fence=seat.run.fence, error=error)
    seat.step = seat.run.step
    seat.is_restored = True


class _Progress:
    """Tells people how far a replay is, now and then."""

    def __init__(self, seat: Seat, total: int) -> None:
        self.num_replayed = 0
        self._seat = seat
        self._total = total
        self._told_at = 0.0

    def advance(self) -> None:
        """Count one operation."""
        self.num_replayed += 1
        now = time.monotonic()
        if now - self._told_at >= _TELL_S:
            self._told_at = now
            claims.enter_replay(self._seat.run, num_replayed=self.num_replayed, num_to_replay=self._total)

    def end(self) -> None:
        """The run is back."""
        if self._told_at:
            claims.enter_replay(self._seat.run, num_replayed=0, num_to_replay=0)


def _load_snapshot(seat: Seat) -> int:
    """Import the newest snapshot that is whole and return its seq, or -1 to start from the first operation."""
    for seq, directory in claims.latest_snapshots(seat.run.pk, up_to_seq=seat.run.applied_seq):
        try:
            seat.engine.import_state(seat.adapter_id, snapshots.fetch(directory), optimizer=True)
        except (CheckpointError, OSError) as error:
            logger.warning("snapshot %s of run %s cannot be used: %s", seq, seat.run.public_id, error)
            seat.engine.drop_adapter(seat.adapter_id)
            continue
        return seq
    return -1


def _replay(seat: Seat, taken: TakenOperation) -> None:
    operation = payloads.prepare(taken, seat.adapter_id)
    if isinstance(operation.request, Consumed | Save):
        return
    answer = _apply(seat, operation).answer
    if isinstance(answer, Result) and answer.body is None:
        _note_divergence(seat, taken, f"it succeeded before and fails now: {answer.error}")
    if not isinstance(answer, ForwardBackwardResult) or taken.result is None:
        return
    if payloads.forward_backward_result(answer).body != taken.result:
        _note_divergence(seat, taken, "its result is another one than before")


def _note_divergence(seat: Seat, taken: TakenOperation, reason: str) -> None:
    logger.error("run %s diverged at operation %s: %s", seat.run.public_id, taken.seq, reason)
    detail = {"operation": taken.kind, "reason": reason}
    commits.add_event(seat.run.pk, seq=taken.seq, step=seat.step, kind="diverged", detail=detail)


def _apply(seat: Seat, operation: PreparedOperation) -> Outcome:
    try:
        if isinstance(operation.request, ForwardBackward):
            return handlers.forward_backwards([Turn(seat, operation)])[0]
        if isinstance(operation.request, OptimStep):
            return handlers.optim_steps([Turn(seat, operation)])[0]
        return handlers.single(seat, operation)
    except EngineError as error:
        return handlers.failed(seat, operation, error)
