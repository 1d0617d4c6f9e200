"""Bring a claimed run's adapter back: the newest good snapshot, then the operations after it once more.

Effects are not repeated: replayed results are only compared with the stored ones. Where the same engine must
give the same bits (`MINTWEB_REPLAY=exact`) a difference ends the run; otherwise results may differ within a
tolerance. Either way a difference beyond is entered as a `diverged` event.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from django.conf import settings

from gpuworker import comparisons, failpoints, handlers, payloads, snapshots
from gpuworker.comparisons import Engines
from gpuworker.engine.exceptions import CheckpointError, EngineError, OutOfMemory
from gpuworker.engine.types import ForwardBackward, ForwardBackwardResult, OptimStep
from gpuworker.fingerprints import fingerprint_of
from gpuworker.handlers import Outcome, Turn
from gpuworker.seats import Consumed, PreparedOperation, Save, Seat, Tally
from gpuworker.snapshots import StorageError
from runs.schemas import results
from runs.services import claims, commits
from runs.services.claims import TakenOperation
from runs.services.commits import Result

logger = logging.getLogger(__name__)

_TELL_S: Final = 0.25
# What fails an operation for a while only: no run is given up for it.
_PASSING: Final = (StorageError, OutOfMemory)


class _Diverged(Exception):
    """The state that was rebuilt is not the one that was lost."""

    def __init__(self, taken: TakenOperation, reason: str, *, difference: float | None = None) -> None:
        super().__init__(reason)
        self.taken = taken
        self.reason = reason
        self.difference = difference


def restore(seat: Seat, *, beat: Callable[[], None]) -> None:
    """Make the seat's engine state that after `applied_seq`; `beat` is called after each operation.

    Raises:
        StorageError: a kept state or an operation cannot be read just now.
        OutOfMemory: an operation has no room just now.
    """
    seat.engine.drop_adapter(seat.adapter_id)
    failure = seat.failure or seat.run.failure
    if failure:
        _close(seat, failure)
        return
    start_seq, kept_with = _load_snapshot(seat)
    seat.snapshot_seq = start_seq
    if not claims.has_payloads_after(seat.run.pk, start_seq):
        error = "none of the run's kept states can be read, and the operations before them are deleted"
        _end_run(seat, error)
        return
    seat.tally = _tally_before(seat, start_seq)
    replay = _Replay(seat, start_seq=start_seq, kept_with=kept_with)
    try:
        replay.run(beat)
    except _Diverged as end:
        _end_run(seat, f"diverged at operation {end.taken.seq} ({end.taken.kind}): {end.reason}")
        return
    seat.step = seat.run.step
    seat.is_restored = True
    if replay.changes_engine:
        seat.replay_cost_s = math.inf  # from here on the bits are this engine's: keep them soon
    claims.end_recovery(seat.run, step=seat.step, detail=replay.detail())
    if seat.run.applied_seq >= 0:
        logger.info("run %s is back at operation %s", seat.run.public_id, seat.run.applied_seq)


class _Replay:
    """The operations between a snapshot and `applied_seq`, done again and compared."""

    def __init__(self, seat: Seat, *, start_seq: int, kept_with: Sequence[Mapping[str, str]]) -> None:
        self._seat = seat
        self._span = {"after_seq": start_seq, "up_to_seq": seat.run.applied_seq}
        fingerprint = fingerprint_of(seat.engine)
        earlier = [*kept_with, *claims.fingerprints_of(seat.run.pk, seat.run.base_model, **self._span)]
        self._engines: Engines = comparisons.differences(earlier, fingerprint)
        self._tolerance = comparisons.TOLERANCES.get(fingerprint.get("dtype", ""), 0.0)
        self._must_be_same = not self._engines and _mode(fingerprint.get("device", "cpu")) == "exact"
        self._largest = 0.0
        self._num_replayed = 0
        self._told_at = 0.0

    def run(self, beat: Callable[[], None]) -> None:
        """Replay; raises _Diverged where the run cannot go on."""
        run = self._seat.run
        total = claims.count_applied(run.pk, **self._span)
        for taken in claims.applied_operations(run.pk, **self._span):
            self._do_again(taken)
            failpoints.reach("during_replay")
            beat()
            self._num_replayed += 1
            self._tell(total)

    @property
    def changes_engine(self) -> bool:
        """Whether the run was computed on another engine before."""
        return bool(self._engines)

    def detail(self) -> dict[str, object]:
        """Return what people are told of it."""
        detail: dict[str, object] = {"from_seq": self._span["after_seq"], "num_replayed": self._num_replayed}
        if self._engines:
            detail["engine"] = str(self._engines)
        if not self._must_be_same:
            detail["largest_difference"] = float(f"{self._largest:.3g}")
        return detail

    def _tell(self, total: int) -> None:
        now = time.monotonic()
        if now - self._told_at >= _TELL_S:
            self._told_at = now
            claims.enter_replay(self._seat.run, num_replayed=self._num_replayed, num_to_replay=total)

    def _do_again(self, taken: TakenOperation) -> None:
        operation = payloads.prepare(taken, self._seat.adapter_id)
        if isinstance(operation.request, Consumed | Save):
            return
        outcome = _apply(self._seat, operation)
        if isinstance(outcome.error, _PASSING):
            raise outcome.error
        try:
            self._compare(taken, outcome.answer)
        except _Diverged as found:
            _tell_divergence(self._seat, found)
            if self._must_be_same or found.difference is None:
                raise

    def _compare(self, taken: TakenOperation, answer: ForwardBackwardResult | Result) -> None:
        if isinstance(answer, Result):
            if answer.body is None:
                raise _Diverged(taken, f"it succeeded before and fails now: {answer.error}")
            return
        if taken.result is None:
            return
        replayed = payloads.forward_backward_result(answer).body
        assert replayed is not None
        difference = comparisons.largest_difference(taken.result, replayed)
        self._largest = max(self._largest, difference)
        is_same = replayed == taken.result
        if not is_same and (self._must_be_same or difference > self._tolerance):
            reason = f"its result is another one than before, by up to {difference:.3g}"
            raise _Diverged(taken, reason, difference=difference)


def _mode(device: str) -> str:
    """Return whether a replay must give the same bits: only a CPU promises that, if nothing else was asked for."""
    return settings.REPLAY or ("exact" if device == "cpu" else "fast")


def _end_run(seat: Seat, error: str) -> None:
    """Fail a run whose state is lost; what waits of it, and what still comes, fails with the reason."""
    logger.error("run %s is given up: %s", seat.run.public_id, error)
    commits.fail_run(seat.run.pk, fence=seat.run.fence, error=error)
    _close(seat, error)


def _close(seat: Seat, failure: str) -> None:
    seat.engine.drop_adapter(seat.adapter_id)
    seat.failure = failure
    seat.step = seat.run.step
    seat.is_restored = True
    claims.enter_replay(seat.run, num_replayed=0, num_to_replay=0)


def _load_snapshot(seat: Seat) -> tuple[int, list[dict[str, str]]]:
    """Import the newest snapshot that is whole; returns its seq and what it was computed with.

    They are -1 and nothing when there is none, and the run starts from its first operation.

    Raises:
        StorageError: none can be used, and one that cannot be read just now may be whole.
    """
    unread: StorageError | None = None
    for seq, directory in claims.latest_snapshots(seat.run.pk, up_to_seq=seat.run.applied_seq):
        try:
            state = snapshots.fetch(directory)
            kept_with = snapshots.fingerprint(directory)
            seat.engine.import_state(seat.adapter_id, state, optimizer=True)
        except (CheckpointError, StorageError) as error:
            unread = error if isinstance(error, StorageError) else unread
            logger.warning("snapshot %s of run %s cannot be used: %s", seq, seat.run.public_id, error)
            seat.engine.drop_adapter(seat.adapter_id)
            continue
        seat.step = state.step
        seat.snapshot_directory = directory
        return seq, [kept_with]
    if unread is not None:
        raise unread
    seat.step = 0
    return -1, []


def _tally_before(seat: Seat, start_seq: int) -> Tally:
    """Return what the kept state has accumulated since its last optimizer step: it becomes that step's metrics."""
    tally = Tally()
    for answer in claims.results_since_step(seat.run.pk, up_to_seq=start_seq):
        _, metrics = results.decode_forward_backward(answer)
        tally.add(ForwardBackwardResult(logprobs=(), metrics=metrics), compute_s=0.0, waited_s=0.0)
    return tally


def _tell_divergence(seat: Seat, found: _Diverged) -> None:
    taken = found.taken
    logger.error("run %s diverged at operation %s: %s", seat.run.public_id, taken.seq, found.reason)
    detail: dict[str, object] = {"operation": taken.kind, "seq": taken.seq, "reason": found.reason}
    if found.difference is not None:
        detail["largest_difference"] = (
            str(found.difference) if math.isinf(found.difference) else found.difference
        )
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
