"""Talking to weights: from a target to an operation, its answer, and why that takes so long."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from django.db.models import Count

from runs import ids
from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, Operation, SamplingSession, Session, TrainingRun, User
from runs.schemas import requests, results
from runs.schemas import sampling as schemas
from runs.schemas.playground import Target
from runs.services import access, base_models, operations, run_rows, sampling, sessions, waiting
from runs.services.operations import Submission


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What answers; without a checkpoint the bare base model."""

    base_model: str
    checkpoint: Checkpoint | None

    @property
    def label(self) -> str:
        """The name people see."""
        if self.checkpoint is None:
            return self.base_model
        return "current weights" if self.checkpoint.is_ephemeral else self.checkpoint.name

    @property
    def step(self) -> int | None:
        """The optimizer steps the weights have seen."""
        return None if self.checkpoint is None else self.checkpoint.step

    @property
    def key(self) -> tuple[str, int]:
        """What tells weights apart."""
        return self.base_model, self.checkpoint.pk if self.checkpoint is not None else 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished sample; `error` says why there is none."""

    operation_pk: int
    tokens: list[int]
    stop_reason: str
    seconds: float
    error: str


def open_session(user: User) -> Session:
    """Open the session of one page that talks."""
    return sessions.create_session(user, tags=["playground"], display_name="Playground")


def close_session(session: Session, operation_pks: Collection[int]) -> None:
    """End a page's session; what it still waits for is not drawn to its end."""
    stop(operation_pks)
    sessions.finish(session, "closed")


def weights_of(user: User, target: Target) -> Weights:
    """Return the weights a page asks for.

    Raises:
        NotFound: there is no such run or checkpoint that the user may read.
        RequestInvalid: the base model is not offered, or the run has no checkpoint (at the place `run`).
    """
    if target.base_model is not None:
        return Weights(base_model=base_models.get(target.base_model).name, checkpoint=None)
    if target.checkpoint is not None:
        path = ids.parse_path(target.checkpoint, place="checkpoint")
        checkpoint = access.get_readable_checkpoint(user, path)
        return Weights(base_model=checkpoint.run.base_model, checkpoint=checkpoint)
    run = access.get_run(user, target.run or "")
    newest = newest_checkpoint(run)
    if newest is None:
        raise RequestInvalid(
            "this run has no checkpoint yet, so there are no weights to talk to", place="run"
        )
    return Weights(base_model=run.base_model, checkpoint=newest)


def newest_checkpoint(run: TrainingRun) -> Checkpoint | None:
    """Return the run's current weights as far as they are saved; those of a sampling session count, too."""
    return Checkpoint.objects.filter(run=run).select_related("run").order_by("-seq", "-pk").first()


def open_sampling(session: Session, weights: Weights, *, seq_id: int) -> SamplingSession:
    """Open a sampling session on the weights."""
    return sampling.create_sampling_session(
        session, seq_id=seq_id, base_model=weights.base_model, checkpoint=weights.checkpoint
    )


def submit(
    session: SamplingSession,
    prompt: Sequence[int],
    *,
    seq: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    stop_tokens: Sequence[int],
) -> int:
    """Ask for one sample whose tokens are shown while they are drawn; returns the operation's number.

    Raises:
        NotFound: the weights are somebody else's who has taken them back.
        RequestInvalid: the prompt does not fit the base model.
        RateLimited: too many samples of the user are waiting.
    """
    session = access.get_readable_sampling_session(session.owner, session.public_id)  # as it is by now
    body = schemas.StoredSample.model_validate(
        {
            "sampling_session_id": session.public_id,
            "seq_id": seq,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
            "sampling_params": {
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seed": seed,
                "stop": list(stop_tokens) or None,
            },
            "stream": True,
        }
    )
    info = base_models.get(session.base_model)
    if info.is_loaded:
        schemas.check_prompt(body, vocab_size=info.vocab_size, max_context=info.max_context)
    submission = Submission(kind=Operation.Kind.SAMPLE, seq=seq, payload=requests.canonical_json(body))
    # The run that somebody talks to goes on no sooner for that.
    return operations.submit_sample(session, submission, is_of_run=False)


def answers_of(operation_pks: Collection[int]) -> list[Answer]:
    """Return the answers that are there; a sample that was deleted with its run has an error."""
    rows = {row.pk: row for row in Operation.objects.filter(pk__in=operation_pks).defer("payload")}
    gone = [_no_answer(pk, "the run was deleted") for pk in operation_pks if pk not in rows]
    return gone + [_answer(row) for row in rows.values() if row.state != Operation.State.QUEUED]


def stop(operation_pks: Collection[int]) -> None:
    """Draw no further tokens of these samples."""
    for pk in operation_pks:
        operations.cancel_sample(pk)


def waiting_words(user: User, operation_pk: int) -> str:
    """Return why a sample has no token yet; empty when it is gone."""
    operation = Operation.objects.select_related("sampling_session").filter(pk=operation_pk).first()
    if operation is None or operation.sampling_session is None:
        return ""
    reason = waiting.reason_of(operation)
    if reason:
        return f"waiting: {reason}"
    if operation.worker_id is None:
        before = _num_before(operation, operation.sampling_session.base_model)
        if before:
            return f"waiting: {before} {'sample is' if before == 1 else 'samples are'} before this one"
    return _busy_words(user, operation.sampling_session.base_model)


def _num_before(operation: Operation, base_model: str) -> int:
    """Return about how many samples are begun before this one: owners take turns, the oldest of each first."""
    queued = Operation.objects.filter(state=Operation.State.QUEUED, sampling_session__base_model=base_model)
    num_taken = queued.exclude(worker=None).count()
    waiting = queued.filter(worker=None)
    num_own = waiting.filter(owner_id=operation.owner_id, pk__lt=operation.pk).count()
    others = (
        waiting.exclude(owner_id=operation.owner_id).order_by().values_list("owner").annotate(Count("pk"))
    )
    num_in_turn: int = sum(min(num, num_own + 1) for _, num in others)
    return num_taken + num_own + num_in_turn


def _busy_words(user: User, base_model: str) -> str:
    """Name what else the workers of a base model are at; the runs of other people stay nameless."""
    busy = list(
        TrainingRun.objects.filter(base_model=base_model, worker__stopped_at=None, worker__isnull=False)
        .filter(operations__state=Operation.State.QUEUED)
        .distinct()[:50]
    )
    if not busy:
        return "waiting: the worker is reading the weights and the prompt"
    own = [run for run in busy if run.owner_id == user.pk]
    if not own:
        return "waiting: the worker is busy with somebody else's run"
    named = f"the worker is busy with run {run_rows.title_of(own[0])}"
    others = len(busy) - 1
    return f"waiting: {named}" + (f" and {others} more" if others else "")


def _no_answer(operation_pk: int, error: str) -> Answer:
    return Answer(operation_pk=operation_pk, tokens=[], stop_reason="", seconds=0.0, error=error)


def _answer(row: Operation) -> Answer:
    seconds = 0.0
    if row.finished_at is not None:
        seconds = (row.finished_at - (row.started_at or row.created_at)).total_seconds()
    if row.result is None:
        return _no_answer(row.pk, row.error)
    first = results.decode_sample(bytes(row.result)).sequences[0]
    return Answer(
        operation_pk=row.pk,
        tokens=first.tokens.tolist(),
        stop_reason=first.stop_reason,
        seconds=seconds,
        error="",
    )
