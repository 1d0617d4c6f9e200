"""The last of the three stages: serialise results, write checkpoints, commit, in the order computed.

A save that only feeds a sampling session is answered first and written then; what comes after it waits for the file.
Runs in a thread of its own while the next cycle computes. A database that is away is waited for, with what
was written to storage before: only the commit is tried again. A run that another worker owns by now is given up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from gpuworker import failpoints, payloads, snapshots
from gpuworker.engine.types import OptimStep, SampleResult
from gpuworker.handlers import Outcome, PendingCheckpoint
from gpuworker.outcomes import Item, OutcomeQueue, RunOutcome, SampleOutcome, SamplesTaken, SnapshotOutcome
from gpuworker.seats import Seat
from gpuworker.snapshots import StorageError
from runs.models import TrainingRun
from runs.services import blobs, claims, commits, deletions, early_answers
from runs.services.commits import AppliedOperation, NewCheckpoint, Result, RunCommit
from runs.threads import database_thread, until_reachable

logger = logging.getLogger(__name__)
# What a snapshot that could not be written counts as in its seat's replay cost: half of what asks for the next one.
_UNWRITTEN_COST_S: Final = 10.0
# A file that was promised is tried again so often before its checkpoint is given up; others wait meanwhile.
_WRITE_AGAIN_S: Final = (0.1, 0.5, 1.0, 2.0)


class Committer:
    """Takes outcomes from the compute stage and makes them true, one item after the other; samples that wait together.

    Args:
        state_bytes: memory of the states that wait to be written; a single item may exceed it.
    """

    def __init__(
        self,
        *,
        on_lost: Callable[[], None],
        on_sample_end: Callable[[int], None],
        state_bytes: int | None = None,
    ) -> None:
        self._on_lost = on_lost
        self._on_sample_end = on_sample_end
        self._queue = OutcomeQueue(state_bytes)
        self._unwritten: set[str] = set()
        self._thread = database_thread("committer", self._loop)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand over an item; blocks while too many wait, or too large ones: compute cannot run away from the log."""
        self._queue.put(item)

    @property
    def state_bytes(self) -> int:
        """What the states that wait to be written may take."""
        return self._queue.state_bytes

    @property
    def unwritten(self) -> list[str]:
        """The folders of the weights that may be sampled from in memory while their files are being written."""
        return list(self._unwritten.copy())

    def flush(self) -> None:
        """Wait until everything handed over is committed or given up."""
        self._queue.flush()

    def stop(self) -> None:
        """Finish what waits and end the thread."""
        self._queue.close()
        self._thread.join()

    def _loop(self) -> None:
        while (taken := self._queue.take()) is not None:
            try:
                if isinstance(taken, SamplesTaken):
                    self._commit_samples(taken.samples)
                else:
                    self._commit(taken)
            finally:
                del taken  # while nothing comes its state would stay in memory
                self._queue.end_taken()

    def _commit_samples(self, samples: Sequence[SampleOutcome]) -> None:
        if not self._attempt(lambda: _commit_samples(samples)):
            for sample in samples:
                self._attempt(lambda sample=sample: _commit_samples([sample]))  # type: ignore[misc]
        for sample in samples:
            self._on_sample_end(sample.operation_pk)

    def _commit(self, item: Sequence[RunOutcome] | SnapshotOutcome) -> None:
        if isinstance(item, SnapshotOutcome):
            is_written = self._attempt(lambda: _commit_snapshot(item))
            _note_snapshot(item, is_written=is_written)
        elif not self._attempt(lambda: self._commit_cycle(item)):
            for run in item:
                run.seat.is_lost |= not self._attempt(lambda run=run: self._commit_cycle([run]))  # type: ignore[misc]
        if not isinstance(item, SnapshotOutcome) and (lost := [run for run in item if run.seat.is_lost]):
            self._attempt(lambda: _remove_files(lost))
            self._on_lost()

    def _commit_cycle(self, runs: Sequence[RunOutcome]) -> None:
        parts = [_parts_of(run) for run in runs if not run.seat.is_lost]
        _commit_together([first for first, *_ in parts if not first.is_early])
        for run in parts:
            for part in run if run[0].is_early else run[1:]:
                if part.seat.is_lost:
                    break
                if part.is_early:
                    self._commit_early(part)
                else:
                    _commit_together([part])

    def _commit_early(self, run: RunOutcome) -> None:
        """Answer a save, write its file, and only then count it as applied."""
        (outcome,) = run.outcomes
        pending = outcome.checkpoint
        assert pending is not None
        commit = _run_commit(replace(run, outcomes=[replace(outcome, checkpoint=None)]))
        self._unwritten.add(pending.directory)
        try:
            if not until_reachable(
                partial(early_answers.give, commit, _new_checkpoint(pending, size_bytes=0))
            ):
                run.seat.is_lost = True
                return
            failpoints.reach("after_answer")
            _write_owed(run.seat, pending)
        finally:
            self._unwritten.discard(pending.directory)
        _commit_all([run], [commit])

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Do what an item asks; false, with the reason logged, when that fails."""
        try:
            action()
        except Exception:
            logger.exception("an outcome could not be committed")
            return False
        return True


def _commit_samples(samples: Sequence[SampleOutcome]) -> None:
    answers = {sample.operation_pk: _answer_of(sample) for sample in samples}
    until_reachable(partial(commits.commit_samples, answers))


def _answer_of(sample: SampleOutcome) -> Result:
    answer = sample.answer
    if isinstance(answer, SampleResult):
        return payloads.sample_result(answer, num_prompt_logprobs=sample.num_prompt_logprobs)
    return answer


def _commit_together(runs: Sequence[RunOutcome]) -> None:
    _commit_all(runs, [_run_commit(run) for run in runs])


def _commit_all(runs: Sequence[RunOutcome], batch: Sequence[RunCommit]) -> None:
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
    began = time.monotonic()
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
    useless = until_reachable(register)
    kept = {item.seq: directory}
    if directory in useless:
        rows = until_reachable(partial(claims.latest_snapshots, seat.run.pk, up_to_seq=item.seq))
        kept = dict(reversed(rows))
    if item.seq in kept:
        seat.snapshot_directory = kept[item.seq]
        seat.snapshot_seq = item.seq
    seat.snapshot_cost_s = item.copy_s + time.monotonic() - began


def _note_snapshot(item: SnapshotOutcome, *, is_written: bool) -> None:
    """Leave a state that could not be written with its seat, where it is in no other place any more."""
    seat = item.seat
    if is_written:
        seat.unwritten = None
        return
    seat.replay_cost_s += _UNWRITTEN_COST_S
    if seat.is_shelved and item.seq == seat.applied_seq:
        seat.unwritten = item.state


def _remove_files(lost: Sequence[RunOutcome]) -> None:
    """Delete what was written for commits that did not come about; a folder that a row names all the same stays.

    No other worker has a folder of the same name, see `snapshots.new_directory`.
    """
    pending = [one.checkpoint for run in lost for one in run.outcomes if one.checkpoint is not None]
    if pending:
        until_reachable(partial(deletions.add, *(checkpoint.directory for checkpoint in pending)))


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
        state=_state(run, failed_run),
        error=failed_run,
    )


def _state(run: RunOutcome, failed_run: str) -> TrainingRun.State:
    if failed_run:
        return TrainingRun.State.FAILED
    return TrainingRun.State.CLOSED if run.seat.is_closed and run.is_last else TrainingRun.State.OPEN


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


def _parts_of(run: RunOutcome) -> list[RunOutcome]:
    """Divide what a cycle did to a run where a save is to be answered before its file is written."""
    parts: list[RunOutcome] = []
    from_seq = run.from_seq
    for one in run.outcomes:
        is_early = _may_be_early(one)  # asked once: the disk may have other room a moment later
        if parts and not (is_early or parts[-1].is_early):
            parts[-1] = replace(parts[-1], outcomes=[*parts[-1].outcomes, one])
        else:
            parts.append(replace(run, from_seq=from_seq, outcomes=[one], is_last=False, is_early=is_early))
        from_seq = one.operation.seq
    return [*parts[:-1], replace(parts[-1], is_last=True)]


def _may_be_early(outcome: Outcome) -> bool:
    """Say whether this is a save for sampling that there is room for, or that was answered already."""
    pending, taken = outcome.checkpoint, outcome.operation.taken
    if pending is None or taken is None or not pending.save.is_ephemeral:
        return False
    return taken.is_answered or blobs.has_room(pending.directory, 2 * pending.state.num_bytes)


def _write_owed(seat: Seat, pending: PendingCheckpoint) -> None:
    """Write a file that was promised, unless nobody wants it any more; one that storage keeps refusing is given up."""
    directory = pending.directory
    if not until_reachable(partial(early_answers.is_owed, directory)):
        return
    try:
        size = _written_patiently(seat, pending)
    except StorageError:
        logger.exception("weights of run %s to sample from are given up", seat.run.public_id)
        until_reachable(partial(early_answers.withdraw, directory))
        return
    until_reachable(partial(early_answers.settle, directory, size))


def _written_patiently(seat: Seat, pending: PendingCheckpoint) -> int:
    for pause_s in _WRITE_AGAIN_S:
        try:
            return snapshots.store(pending.state, pending.directory, seat)
        except StorageError as error:
            logger.warning("weights to sample from are not written yet, trying again: %s", error)
            time.sleep(pause_s)
    return snapshots.store(pending.state, pending.directory, seat)


def _written(seat: Seat, pending: PendingCheckpoint) -> NewCheckpoint:
    return _new_checkpoint(pending, size_bytes=snapshots.store(pending.state, pending.directory, seat))


def _new_checkpoint(pending: PendingCheckpoint, *, size_bytes: int) -> NewCheckpoint:
    save = pending.save
    return NewCheckpoint(
        kind=save.kind,
        name=save.name,
        directory=pending.directory,
        size_bytes=size_bytes,
        is_ephemeral=save.is_ephemeral,
        overwrite=save.overwrite,
        ttl_seconds=save.ttl_seconds,
        user_metadata=save.user_metadata,
        sampling_session_seq=save.sampling_session_seq,
    )
