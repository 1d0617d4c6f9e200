"""Make runs, tell what state they are in, and close them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from django.db import transaction
from django.db.models import Case, Exists, F, OuterRef, Q, QuerySet, Subquery, Value, When
from django.db.models.functions import Coalesce, Now

from runs import events, ids
from runs.exceptions import RequestInvalid
from runs.models import (
    Checkpoint,
    Operation,
    Recipe,
    RunEvent,
    Session,
    TrainingRun,
)
from runs.services import (
    access,
    base_models,
    holdups,
    loads,
    operations,
    sampling,
    sessions,
    workers,
)
from runs.services.operations import Submission

LORA_ALPHA: Final = 32.0
_RECENT: Final = timedelta(seconds=10)
_MAX_MODEL_SEQ_ID: Final = 2**31 - 1
# How a client leaves a run that is finished: it lets the run go, or closes its session.
_WELL: Final = ("", sessions.SUCCESS)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter a client asks for; a seed of None is drawn here and kept."""

    rank: int
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint to start from."""

    checkpoint: Checkpoint
    with_optimizer: bool


class DisplayState(StrEnum):
    """What a person sees; derived from rows, never stored."""

    FAILED = "failed"
    CLOSED = "finished"
    STOPPED = "stopped"
    PAUSED = "paused"
    PREPARING = "preparing"
    QUEUED = "queued"
    RUNNING = "running"
    STOPPING = "stopping"
    RECOVERING = "recovering"
    HELD_UP = "held up"
    WAITING_FOR_WORKER = "waiting for worker"
    WAITING_FOR_CLIENT = "waiting for client"
    PARKED = "parked"


# What a recipe's state looks like from outside; one that trains has the state of its operations.
_OF_RECIPE: Final = {
    Recipe.State.PREPARING: DisplayState.PREPARING,
    Recipe.State.QUEUED: DisplayState.QUEUED,
    Recipe.State.PAUSED: DisplayState.PAUSED,
    Recipe.State.FINISHED: DisplayState.CLOSED,
    Recipe.State.STOPPED: DisplayState.STOPPED,
    Recipe.State.DISCARDED: DisplayState.STOPPED,
    Recipe.State.FAILED: DisplayState.FAILED,
}
# Nothing more comes of such a run by itself.
OVER: Final = (DisplayState.FAILED, DisplayState.CLOSED, DisplayState.STOPPED)
_STOPPING: Final = (Recipe.State.STOPPING, Recipe.State.DISCARDING)
_TRAINING: Final = (Recipe.State.RUNNING, Recipe.State.FINISHING, *_STOPPING)


def create_run(
    session: Session,
    *,
    model_seq_id: int,
    base_model: str,
    lora: Lora,
    user_metadata: Mapping[str, Any] | None = None,
    start: Start | None = None,
    source: str = TrainingRun.Source.SDK,
    name: str = "",
) -> tuple[TrainingRun, int]:
    """Make a run with its first operation (seq 0); a retry returns the first run's.

    Raises:
        RequestInvalid: the base model or rank cannot be served, or the number holds another run.
        NotFound: the checkpoint to start from was deleted meanwhile.
    """
    info = base_models.get(base_model)
    if model_seq_id > _MAX_MODEL_SEQ_ID:
        raise RequestInvalid(f"must be at most {_MAX_MODEL_SEQ_ID}, got {model_seq_id}", place="model_seq_id")
    if info.max_rank and lora.rank > info.max_rank:
        raise RequestInvalid(
            f"{lora.rank} is above {info.max_rank}, the most {base_model} takes", place="lora_config.rank"
        )
    public_id = ids.run_id(session.public_id, model_seq_id)
    with transaction.atomic():
        run, created = TrainingRun.objects.get_or_create(
            session=session,
            model_seq_id=model_seq_id,
            defaults={
                "public_id": public_id,
                "owner_id": session.owner_id,
                "name": name,
                "source": source,
                "user_metadata": dict(user_metadata or {}),
                "base_model": base_model,
                "lora_rank": lora.rank,
                "lora_alpha": LORA_ALPHA,
                "lora_seed": secrets.randbits(31) if lora.seed is None else lora.seed,
                "train_attn": lora.train_attn,
                "train_mlp": lora.train_mlp,
                "train_unembed": lora.train_unembed,
                **({} if start is None else _parentage(start)),
            },
        )
        if not created:
            _check_same(run, base_model, lora)
        if start is not None:
            access.lock(start.checkpoint)  # or its files could go before the log says that they are needed
            _tell_parent(start)
        return run, operations.submit(run, _creation(start))


def made_before(
    session: Session, *, model_seq_id: int, path: str, with_optimizer: bool
) -> tuple[TrainingRun, int] | None:
    """Return what `create_run` has returned to this very request; its checkpoint may be gone by now."""
    run = TrainingRun.objects.filter(session=session, model_seq_id=model_seq_id).first()
    creation = loads.submission(Operation.Kind.CREATE_MODEL, seq=0, path=path, with_optimizer=with_optimizer)
    if run is None or not operations.holds(run, creation):
        return None
    return run, operations.submit(run, creation)


def note_parent(run: TrainingRun, start: Start) -> None:
    """Enter where a run started from that was made bare and loaded a checkpoint before anything else."""
    TrainingRun.objects.filter(pk=run.pk).update(**_parentage(start))
    _tell_parent(start)


def lora_of(checkpoint: Checkpoint) -> Lora:
    """Return the adapter shape a checkpoint needs."""
    run = checkpoint.run
    return Lora(
        rank=run.lora_rank,
        seed=run.lora_seed,
        train_attn=run.train_attn,
        train_mlp=run.train_mlp,
        train_unembed=run.train_unembed,
    )


def with_activity(runs: QuerySet[TrainingRun]) -> QuerySet[TrainingRun]:
    """Annotate what `display_state` needs."""
    waiting = Operation.objects.filter(run=OuterRef("pk"), state=Operation.State.QUEUED)
    samples = Operation.objects.filter(sampled_run_pk=OuterRef("pk"))
    # Not by their state, for which the database would read all that wait.
    open_samples = samples.filter(finished_at=None)
    drawn = samples.filter(finished_at__gt=Now() - _RECENT)
    # Not by a query of its own, for which the database would read every run there is.
    was_applied = Q(last_applied_at__gt=Now() - _RECENT)
    is_recent = Case(When(was_applied | Exists(drawn), then=True), default=False)
    diverged = RunEvent.objects.filter(run=OuterRef("pk"), kind="diverged")
    return runs.annotate(
        has_work=Exists(waiting),
        has_samples=Exists(open_samples),
        has_worker=Exists(workers.live().filter(pk=OuterRef("worker"))),
        is_recent=is_recent,
        is_held_up=holdups.is_held_up(),
        recipe_state=F("recipe__state"),
        is_served=Exists(workers.serving()),
        has_diverged=Exists(diverged),
        is_abandoned=Exists(sessions.silent().filter(pk=OuterRef("session"))),
        client_ended=_client_ended(),
        client_seen_at=F("session__last_heartbeat_at"),
    )


def display_state(run: TrainingRun) -> DisplayState:
    """Return the state a person sees; the run comes from `with_activity`."""
    state = _state_of(run)
    is_stopping = run.recipe_state in _STOPPING  # type: ignore[attr-defined]
    return DisplayState.STOPPING if state == DisplayState.RUNNING and is_stopping else state


def _state_of(run: TrainingRun) -> DisplayState:
    if run.state == TrainingRun.State.FAILED:
        return DisplayState.FAILED
    if run.recipe_state in _OF_RECIPE:  # type: ignore[attr-defined]
        return _OF_RECIPE[run.recipe_state]  # type: ignore[attr-defined]
    if run.state == TrainingRun.State.CLOSED:
        return _ended(run)
    if run.is_held_up:  # type: ignore[attr-defined]
        return DisplayState.HELD_UP
    is_served: bool = run.is_served  # type: ignore[attr-defined]
    if run.has_work and run.has_worker:  # type: ignore[attr-defined]
        return DisplayState.RECOVERING if run.num_to_replay else DisplayState.RUNNING
    if run.has_work:  # type: ignore[attr-defined]
        return DisplayState.QUEUED if is_served else DisplayState.WAITING_FOR_WORKER
    if run.recipe_state is not None:  # type: ignore[attr-defined]
        return DisplayState.RUNNING if is_served else DisplayState.WAITING_FOR_WORKER
    return _without_work(run)


def _without_work(run: TrainingRun) -> DisplayState:
    """Return what a run is about whose operations are all done; samples of its weights may still be drawn."""
    if run.client_ended:  # type: ignore[attr-defined]
        return _ended(run)
    if run.has_samples:  # type: ignore[attr-defined]
        return DisplayState.RUNNING if run.is_served else DisplayState.WAITING_FOR_WORKER  # type: ignore[attr-defined]
    if run.is_recent:  # type: ignore[attr-defined]
        return DisplayState.RUNNING
    return DisplayState.PARKED if run.is_abandoned else DisplayState.WAITING_FOR_CLIENT  # type: ignore[attr-defined]


def _client_ended() -> Case:
    """Return why the client closed its session; nothing where it had let the run go by itself before."""
    was_let_go = Q(state=TrainingRun.State.CLOSED, last_applied_at__lt=F("session__finished_at"))
    return Case(When(was_let_go, then=Value("")), default=F("session__finish_reason"))


def _ended(run: TrainingRun) -> DisplayState:
    return DisplayState.CLOSED if run.client_ended in _WELL else DisplayState.STOPPED  # type: ignore[attr-defined]


def over_among(run_pks: Sequence[int]) -> list[int]:
    """Return those of the runs that have ended or are deleted; one that a recipe trains ends with the recipe."""
    found = with_activity(TrainingRun.objects.filter(pk__in=run_pks))
    going = {run.pk for run in found if not _is_over(run)}
    return [pk for pk in run_pks if pk not in going]


def _is_over(run: TrainingRun) -> bool:
    recipe_state: str | None = run.recipe_state  # type: ignore[attr-defined]
    state = display_state(run) if recipe_state is None else _OF_RECIPE.get(Recipe.State(recipe_state))
    return state in OVER


def in_display_state(runs: QuerySet[TrainingRun], state: DisplayState) -> QuerySet[TrainingRun]:
    """Keep the runs a person sees in this state; the runs come from `with_activity`."""
    of_recipe = [recipe for recipe, shown in _OF_RECIPE.items() if shown == state]
    has_failed = Q(state=TrainingRun.State.FAILED)
    follows_operations = ~has_failed & (Q(recipe=None) | Q(recipe__state__in=_TRAINING))
    is_held_up = follows_operations & Q(state=TrainingRun.State.OPEN, is_held_up=True)
    is_open = Q(state=TrainingRun.State.OPEN, is_held_up=False)
    held = is_open & Q(has_work=True, has_worker=True)
    free = is_open & Q(has_work=True, has_worker=False)
    of_loop = is_open & Q(has_work=False, recipe__isnull=False)
    of_client = is_open & Q(has_work=False, recipe=None)
    here = of_client & Q(client_ended="")
    ended = of_client & ~Q(client_ended="")
    is_closed = Q(state=TrainingRun.State.CLOSED)
    sampling = here & Q(has_samples=True)
    idle = here & Q(has_samples=False, is_recent=False)
    at_work = (
        (held & Q(num_to_replay=0))
        | ((of_loop | sampling) & Q(is_served=True))
        | (here & Q(has_samples=False, is_recent=True))
    )
    conditions = {
        DisplayState.CLOSED: (is_closed | ended) & Q(client_ended__in=_WELL),
        DisplayState.STOPPED: (is_closed | ended) & ~Q(client_ended__in=_WELL),
        DisplayState.RUNNING: at_work & (Q(recipe=None) | ~Q(recipe__state__in=_STOPPING)),
        DisplayState.STOPPING: at_work & Q(recipe__state__in=_STOPPING),
        DisplayState.RECOVERING: held & Q(num_to_replay__gt=0),
        DisplayState.WAITING_FOR_CLIENT: idle & Q(is_abandoned=False),
        DisplayState.PARKED: idle & Q(is_abandoned=True),
        DisplayState.QUEUED: free & Q(is_served=True),
        DisplayState.WAITING_FOR_WORKER: (free | of_loop | sampling) & Q(is_served=False),
    }
    found = Q(recipe__state__in=of_recipe) & ~has_failed
    if state == DisplayState.FAILED:
        found |= has_failed
    elif state == DisplayState.HELD_UP:
        found |= is_held_up
    elif state in conditions:
        found |= follows_operations & conditions[state]
    return runs.filter(found)


@dataclass(frozen=True, kw_only=True)
class Latest:
    """When a run's client last asked for something, and the run's newest checkpoints with a name."""

    asked_at: datetime
    training: Checkpoint | None
    sampler: Checkpoint | None


def latest_of(runs: Sequence[TrainingRun]) -> dict[int, Latest]:
    """Return the latest of each run, by its number; as many queries for many runs as for one."""
    asked_at = Operation.objects.filter(run=OuterRef("pk")).order_by("-seq").values("created_at")[:1]
    found = TrainingRun.objects.filter(pk__in=[run.pk for run in runs]).values_list(
        "pk",
        Coalesce(Subquery(asked_at), "created_at"),
        Subquery(_newest(Checkpoint.Kind.TRAINING)),
        Subquery(_newest(Checkpoint.Kind.SAMPLER)),
    )
    facts = list(found)
    pks = {pk for _, _, *newest in facts for pk in newest if pk is not None}
    saved = Checkpoint.objects.select_related("run").in_bulk(pks)
    return {
        pk: Latest(asked_at=at, training=saved.get(training), sampler=saved.get(sampler))
        for pk, at, training, sampler in facts
    }


def _newest(kind: Checkpoint.Kind) -> QuerySet[Checkpoint, int]:
    named = Checkpoint.objects.filter(run=OuterRef("pk"), kind=kind, is_ephemeral=False)
    return named.order_by("-created_at", "-id").values_list("pk", flat=True)[:1]


def rename(run: TrainingRun, name: str) -> None:
    """Give the run a name for people."""
    TrainingRun.objects.filter(pk=run.pk).update(name=name[:200])


def _creation(start: Start | None) -> Submission:
    kind = Operation.Kind.CREATE_MODEL
    if start is None:
        return Submission(kind=kind, seq=0, payload=b"{}")
    return loads.submission(
        kind,
        seq=0,
        path=sampling.path_of(start.checkpoint),
        with_optimizer=start.with_optimizer,
        directory=start.checkpoint.directory,
    )


def _parentage(start: Start) -> dict[str, Any]:
    """Return the columns of a run that tell what it is a fork of."""
    checkpoint = start.checkpoint
    return {
        "parent": checkpoint.run,
        "parent_step": checkpoint.step,
        "parent_path": sampling.path_of(checkpoint),
        "parent_seq": checkpoint.seq,
        "continues_parent": start.with_optimizer and checkpoint.step > 0,
    }


def _tell_parent(start: Start) -> None:
    """Let the parent's page list the fork."""
    parent = start.checkpoint.run
    events.run_changed(parent.pk, parent.owner_id, parent.public_id)


def _check_same(run: TrainingRun, base_model: str, lora: Lora) -> None:
    asked = (base_model, lora.rank, lora.train_attn, lora.train_mlp, lora.train_unembed)
    held = (run.base_model, run.lora_rank, run.train_attn, run.train_mlp, run.train_unembed)
    if asked != held:
        raise RequestInvalid(
            f"{run.model_seq_id} already names a run of {run.base_model} with rank {run.lora_rank}",
            place="model_seq_id",
        )
