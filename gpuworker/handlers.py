"""One function per kind of operation: what it does to the engine, and what it answers.

Called by the scheduler's compute stage in seq order, and again with the same operations when a run
is replayed. Nothing here touches a row; the committer makes the outcome true.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from django.conf import settings

from gpuworker import payloads, snapshots
from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.exceptions import AdapterNotLoaded, CheckpointError, EngineError, NonFiniteError
from gpuworker.engine.types import (
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
    OptimStepResult,
)
from gpuworker.seats import Consumed, Create, Load, PreparedOperation, Record, Save, Seat, Unload, Unreadable
from runs import ids
from runs.schemas import responses
from runs.services import claims
from runs.services.commits import Result
from runs.threads import until_reachable

Answer: TypeAlias = ForwardBackwardResult | Result


@dataclass(frozen=True, kw_only=True)
class PendingCheckpoint:
    """A state to be written by the committer before the operation is committed."""

    state: AdapterState
    directory: str
    save: Save


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one operation did; its result is serialised by the committer, off the compute stage.

    `metrics_step` is the step that `metrics` are of, where that is not `step`. `event` is the kind of an event that
    people should see on the run's chart. `error` is why it could not be applied.
    """

    operation: PreparedOperation
    step: int
    answer: Answer
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_step: int | None = None
    num_tokens: int = 0
    loss: float | None = None
    checkpoint: PendingCheckpoint | None = None
    failed_run: str = ""
    event: str = ""
    error: EngineError | None = None


@dataclass(frozen=True)
class Turn:
    """One seat's operation in a batch that goes through the engine together."""

    seat: Seat
    operation: PreparedOperation


def forward_backwards(turns: Sequence[Turn]) -> list[Outcome]:
    """Run the forward_backwards of all seats through the model in one packed pass."""
    engine = turns[0].seat.engine
    started_at = time.monotonic()
    answers = engine.forward_backward([_job(turn) for turn in turns])
    elapsed_s = time.monotonic() - started_at
    total = sum(turn.operation.num_tokens for turn in turns) or 1
    return [
        _forward_backward_outcome(turn, answer, elapsed_s * turn.operation.num_tokens / total)
        for turn, answer in zip(turns, answers, strict=True)
    ]


def optim_steps(turns: Sequence[Turn]) -> list[Outcome]:
    """Take the optimizer steps of all seats together."""
    engine = turns[0].seat.engine
    answers = engine.optim_step([_step(turn) for turn in turns])
    return [_optim_outcome(turn, answer) for turn, answer in zip(turns, answers, strict=True)]


def single(seat: Seat, operation: PreparedOperation) -> Outcome:
    """Apply an operation that goes alone: create, load, save, record, unload, or a seq to pass over."""
    request = operation.request
    try:
        if seat.failure and not isinstance(request, Unload | Consumed):
            raise EngineError(seat.failure)
        if isinstance(request, Create):
            return _create(seat, operation, request)
        if isinstance(request, Load):
            return _load(seat, operation, request)
        if isinstance(request, Save):
            return _save(seat, operation, request)
        if isinstance(request, Record):
            return _record(seat, operation, request)
        if isinstance(request, Unload):
            return _unload(seat, operation)
        if isinstance(request, Unreadable):
            raise EngineError(request.error)
        assert isinstance(request, Consumed)
        return Outcome(operation=operation, step=seat.step, answer=Result(error="not used", category="user"))
    except EngineError as error:
        return failed(seat, operation, error)


def failed(seat: Seat, operation: PreparedOperation, error: EngineError) -> Outcome:
    """Return the outcome of an operation that could not be applied; a run whose creation fails has failed."""
    failed_run = str(error) if isinstance(operation.request, Create) else ""
    answer = payloads.error_result(EngineError(seat.failure) if seat.failure else error)
    return Outcome(operation=operation, step=seat.step, answer=answer, failed_run=failed_run, error=error)


def _job(turn: Turn) -> ForwardBackward:
    assert isinstance(turn.operation.request, ForwardBackward)
    return turn.operation.request


def _step(turn: Turn) -> OptimStep:
    assert isinstance(turn.operation.request, OptimStep)
    return turn.operation.request


def _forward_backward_outcome(
    turn: Turn, answer: ForwardBackwardResult | EngineError, compute_s: float
) -> Outcome:
    seat, operation = turn.seat, turn.operation
    if isinstance(answer, NonFiniteError):
        return _not_finite(failed(seat, operation, answer), "not_finite", seat, answer)
    if isinstance(answer, EngineError):
        return failed(seat, operation, answer)
    seat.replay_cost_s += compute_s
    if _job(turn).backward:
        waited_s = operation.taken.waited_s if operation.taken else 0.0
        seat.tally.add(answer, compute_s=compute_s, waited_s=waited_s)
    return Outcome(
        operation=operation, step=seat.step, answer=answer, num_tokens=int(answer.metrics["tokens:sum"])
    )


def _optim_outcome(turn: Turn, answer: OptimStepResult | EngineError) -> Outcome:
    seat, operation = turn.seat, turn.operation
    seat.tally.client_gap_s += operation.client_gap_s
    if isinstance(answer, EngineError):
        return failed(seat, operation, answer)
    seat.step = answer.step
    metrics = seat.tally.close(answer, _step(turn).params.learning_rate, has_client=seat.run.has_client)
    if answer.skipped:
        metrics["skipped"] = 1.0
        error = NonFiniteError(f"the gradient is not finite: its norm is {answer.grad_norm}")
        if _ends_runs(seat):
            return _not_finite(failed(seat, operation, error), "step_skipped", seat, error)
    wire = {
        "step": float(answer.step),
        "grad_norm": answer.grad_norm,
        "learning_rate": metrics["learning_rate"],
    }
    return Outcome(
        operation=operation,
        step=answer.step,
        answer=payloads.json_result(dict(responses.optim_step_result(wire))),
        metrics=metrics,
        loss=metrics.get("loss"),
        event="step_skipped" if answer.skipped else "",
    )


def _not_finite(outcome: Outcome, event: str, seat: Seat, error: NonFiniteError) -> Outcome:
    """Return the outcome of an operation with numbers that are none; it ends the run if the settings want that."""
    if not _ends_runs(seat) or seat.failure:
        return replace(outcome, event=event)
    seat.failure = f"ended at step {seat.step}: {error}"
    seat.engine.drop_adapter(seat.adapter_id)
    return replace(outcome, event=event, failed_run=seat.failure)


def _ends_runs(seat: Seat) -> bool:
    """Say whether such numbers end the run: while it is replayed they do what they did, whatever is set by now."""
    return bool(settings.NONFINITE == "fail" and seat.is_restored)


def _create(seat: Seat, operation: PreparedOperation, request: Create) -> Outcome:
    if request.load is None:
        seat.engine.create_adapter(seat.adapter_id, seat.spec)
        content = dict(responses.create_model_result(seat.run.public_id))
    else:
        content = _import(seat, request.load)
    return Outcome(operation=operation, step=seat.step, answer=payloads.json_result(content))


def _load(seat: Seat, operation: PreparedOperation, request: Load) -> Outcome:
    if not seat.engine.has_adapter(seat.adapter_id):
        raise AdapterNotLoaded("the run has no adapter: its creation failed")
    return Outcome(operation=operation, step=seat.step, answer=payloads.json_result(_import(seat, request)))


def _import(seat: Seat, load: Load) -> dict[str, object]:
    state = snapshots.fetch(load.directory)
    if load.optimizer and state.optimizer is None:
        raise CheckpointError(f"{load.path} holds sampler weights only; load it without the optimizer")
    seat.engine.import_state(seat.adapter_id, state, optimizer=load.optimizer)
    seat.step = state.step if load.optimizer else 0
    seat.tally.drop_passes()
    return dict(responses.load_weights_result(load.path, model_id=seat.run.public_id))


def _save(seat: Seat, operation: PreparedOperation, save: Save) -> Outcome:
    with_optimizer = save.kind == "weights"
    state = seat.engine.export_state(seat.adapter_id, optimizer=with_optimizer, gradients=False)
    seat.note_saved(save, operation.seq)
    directory = snapshots.new_directory("checkpoints", seat.run.pk, operation.seq, seat.run.fence)
    if save.kind == "sampler_weights":
        seat.engine.keep_sampler(directory, seat.adapter_id)
    return Outcome(
        operation=operation,
        step=seat.step,
        answer=payloads.json_result(_save_content(seat, save)),
        checkpoint=PendingCheckpoint(state=state, directory=directory, save=save),
    )


def _save_content(seat: Seat, save: Save) -> dict[str, object]:
    if save.sampling_session_seq is not None:
        session_id = ids.sampling_session_id(seat.run.session_public_id, save.sampling_session_seq)
        return dict(responses.ephemeral_sampler_result(session_id))
    path = str(ids.CheckpointPath(seat.run.public_id, save.kind, save.name))
    if save.kind == "weights":
        return dict(responses.save_weights_result(path))
    return dict(responses.save_weights_for_sampler_result(path))


def _record(seat: Seat, operation: PreparedOperation, record: Record) -> Outcome:
    return Outcome(
        operation=operation,
        step=seat.step,
        answer=payloads.json_result({}),
        metrics=dict(record.metrics),
        metrics_step=record.step,
    )


def _unload(seat: Seat, operation: PreparedOperation) -> Outcome:
    seat.engine.drop_adapter(seat.adapter_id)
    seat.is_closed = True
    content = dict(responses.unload_model_result(seat.run.public_id))
    return Outcome(operation=operation, step=seat.step, answer=payloads.json_result(content))


def is_name_taken(seat: Seat, save: Save) -> bool:
    """Return whether a row has the name, or a save that is not committed yet will."""
    if seat.saved_names.get((save.kind, save.name), -1) > seat.committed_seq:
        return True
    if save.is_ephemeral:
        return False
    return until_reachable(partial(claims.checkpoint_exists, seat.run.pk, kind=save.kind, name=save.name))
