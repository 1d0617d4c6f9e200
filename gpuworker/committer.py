"""The last of the three stages: serialise results, write checkpoints, commit, in the order computed.

Runs in a thread of its own while the next cycle computes. A database that is away is waited for, with what
was written to storage before: only the commit is tried again. A run that another worker owns by now is given up.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from gpuworker import failpoints, payloads, snapshots
from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.types import OptimStep, SampleResult
from gpuworker.handlers import Outcome, PendingCheckpoint
from gpuworker.seats import Seat
from gpuworker.snapshots import StorageError
from runs.models import TrainingRun
from runs.services import blobs, commits
from runs.services.commits import AppliedOperation, NewCheckpoint, Result, RunCommit
from runs.threads import database_thread, until_reachable

logger = logging.getLogger(__name__)
_MAX_WAITING: Final = 8
# What a snapshot that could not be written counts as in its seat's replay cost: half of what asks for the next one.
_UNWRITTEN_COST_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What one cycle did to one seat."""

    seat: Seat
    from_seq: int
    outcomes: Sequence[Outcome]


@dataclass(frozen=True, kw_only=True)
class SampleOutcome:
    """The answer of one sample request, or its error."""

    operation_pk: int
    answer: SampleResult | Result
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class SnapshotOutcome:
    """A seat's state to be kept for replay."""

    seat: Seat
    seq: int
    state: AdapterState


Item = Sequence[RunOutcome] | SampleOutcome | SnapshotOutcome


class Committer:
    """Takes outcomes from the compute stage and makes them true, one item after the other."""

    def __init__(self, *, on_lost: Callable[[], None], on_sample_end: Callable[[int], None]) -> None:
        self._on_lost = on_lost
        self._on_sample_end = on_sample_end
        self._items: queue.Queue[Item | None] = queue.Queue(maxsize=_MAX_WAITING)
        self._thread = database_thread("committer", self._loop)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand over an item; blocks while too many wait, so that compute cannot run away from the log."""
        self._items.put(item)

    def flush(self) -> None:
        """Wait until everything handed over is committed or given up."""
        self._items.join()

    def stop(self) -> None:
        """Finish what waits and end the thread."""
        self._items.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (item := self._items.get()) is not None:
            try:
                self._commit(item)
            finally:
                self._items.task_done()
        self._items.task_done()

    def _commit(self, item: Item) -> None:
        if isinstance(item, SampleOutcome):
            self._attempt(lambda: _commit_sample(item))
            self._on_sample_end(item.operation_pk)
        elif isinstance(item, SnapshotOutcome):
            if not self._attempt(lambda: _commit_snapshot(item)):
                item.seat.replay_cost_s += _UNWRITTEN_COST_S
        elif not self._attempt(lambda: _commit_cycle(item)):
            for run in item:
                run.seat.is_lost |= not self._attempt(lambda run=run: _commit_cycle([run]))  # type: ignore[misc]
        if not isinstance(item, SampleOutcome | SnapshotOutcome) and any(run.seat.is_lost for run in item):
            self._on_lost()

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Do what an item asks; false, with the reason logged, when that fails."""
        try:
            action()
        except Exception:
            logger.exception("an outcome could not be committed")
            return False
        return True


def _commit_sample(item: SampleOutcome) -> None:
    answer = item.answer
    if isinstance(answer, SampleResult):
        answer = payloads.sample_result(answer, num_prompt_logprobs=item.num_prompt_logprobs)
    until_reachable(partial(commits.commit_sample, item.operation_pk, answer))


def _commit_cycle(runs: Sequence[RunOutcome]) -> None:
    runs = [run for run in runs if not run.seat.is_lost]
    batch = [_run_commit(run) for run in runs]
    failpoints.reach("before_commit")
    were_committed = until_reachable(partial(commits.commit_all, batch))
    failpoints.reach("after_commit")
    for run, commit, was_committed in zip(runs, batch, were_committed, strict=True):
        if was_committed:
            run.seat.committed_seq = commit.to_seq
        else:
            logger.warning("run %s belongs to another worker by now; it is dropped here", commit.public_id)
            run.seat.is_lost = True


def _commit_snapshot(item: SnapshotOutcome) -> None:
    seat = item.seat
    if seat.is_lost:
        return
    directory = snapshots.new_directory("snapshots", seat.run.pk, item.seq, seat.run.fence)
    size = snapshots.store(item.state, directory, seat)
    register = partial(
        commits.register_snapshot,
        seat.run.pk,
        fence=seat.run.fence,
        seq=item.seq,
        directory=directory,
        size_bytes=size,
    )
    for old in until_reachable(register):
        blobs.delete_folder(old)
    seat.snapshot_directory = directory
    seat.snapshot_seq = item.seq


def _run_commit(run: RunOutcome) -> RunCommit:
    held = run.seat.run
    last = run.outcomes[-1]
    failed_run = next((one.failed_run for one in run.outcomes if one.failed_run), "")
    steps = [one for one in run.outcomes if isinstance(one.operation.request, OptimStep) and one.metrics]
    return RunCommit(
        run_pk=held.pk,
        owner_id=held.owner_id,
        public_id=held.public_id,
        base_model=held.base_model,
        session_public_id=held.session_public_id,
        fence=held.fence,
        from_seq=run.from_seq,
        operations=[_applied(run.seat, one) for one in run.outcomes],
        step=last.step,
        num_tokens=sum(one.num_tokens for one in run.outcomes),
        loss=steps[-1].loss if steps else None,
        tokens_per_s=steps[-1].metrics.get("tokens_per_s") if steps else None,
        state=_state(run.seat, failed_run),
        error=failed_run,
    )


def _state(seat: Seat, failed_run: str) -> TrainingRun.State:
    if failed_run:
        return TrainingRun.State.FAILED
    return TrainingRun.State.CLOSED if seat.is_closed else TrainingRun.State.OPEN


def _applied(seat: Seat, outcome: Outcome) -> AppliedOperation:
    taken = outcome.operation.taken
    answer = outcome.answer
    result = answer if isinstance(answer, Result) else payloads.forward_backward_result(answer)
    checkpoint = None
    if outcome.checkpoint is not None:
        try:
            checkpoint = _written(seat, outcome.checkpoint)
        except StorageError as error:
            logger.exception("a checkpoint of run %s could not be written", seat.run.public_id)
            result = payloads.error_result(error)
    return AppliedOperation(
        pk=taken.pk if taken else None,
        seq=outcome.operation.seq,
        step=outcome.step if outcome.metrics_step is None else outcome.metrics_step,
        result=result,
        metrics=outcome.metrics,
        checkpoint=checkpoint,
        event=outcome.event,
    )


def _written(seat: Seat, pending: PendingCheckpoint) -> NewCheckpoint:
    size = snapshots.store(pending.state, pending.directory, seat)
    save = pending.save
    return NewCheckpoint(
        kind=save.kind,
        name=save.name,
        directory=pending.directory,
        size_bytes=size,
        is_ephemeral=save.is_ephemeral,
        overwrite=save.overwrite,
        ttl_seconds=save.ttl_seconds,
        user_metadata=save.user_metadata,
        sampling_session_seq=save.sampling_session_seq,
    )
