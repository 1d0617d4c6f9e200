"""Steering of runs that need no code: how they are getting on, and every action of the run's page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

from django.http import HttpRequest
from ninja import Router, Status
from pydantic import BaseModel, Field, JsonValue

from runs import ids
from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, Recipe
from runs.recipes import defaults
from runs.rest.bodies import JsonBody
from runs.rest.boundary import caller
from runs.rest.rendering import Number
from runs.rest.runs import RequestModel, RunDetail, read
from runs.schemas.names import CheckpointName, DisplayName
from runs.schemas.recipes import MAX_STEPS, Changes, SftConfig
from runs.schemas.waits import WaitS
from runs.services import access, recipe_status, recipes

router = Router(tags=["steering"])

Action = Literal["change", "extend", "pause", "resume", "retry", "save", "stop"]


class RunStatus(BaseModel):
    """How far a run has come and what may be done with it now."""

    state: str
    phase: str = Field(description="What it is doing, in words.")
    step: int
    num_steps: int
    share: float = Field(description="How much is done, 0 to 1.")
    eta_low_s: Number = Field(description="The time left, from")
    eta_high_s: Number = Field(description="and to; null before the pace is known.")
    position: int | None = Field(description="Its place in the queue, from 1.")
    starts_in_s: Number
    allowed: list[Action]
    started_at: datetime | None
    ended_at: datetime | None
    is_over: bool


class Stop(RequestModel):
    """Whether the weights are kept, with a last checkpoint."""

    keep: bool = True


class Save(RequestModel):
    """A name for the checkpoint; without one it is manual-<step>."""

    name: CheckpointName | None = None


class Saving(BaseModel):
    """The checkpoint that is being saved; it is there once the run's events say `saved`."""

    name: str
    path: str


class Extend(RequestModel):
    """How many steps to add."""

    num_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]


class Fork(RequestModel):
    """Where the new run starts and what is different about it."""

    checkpoint: Annotated[str, Field(max_length=200)] = Field(
        default="", description="`weights/NAME` or NAME; the newest training checkpoint when left out."
    )
    with_optimizer: bool = True
    changes: dict[str, JsonValue] = Field(
        default={}, description="Settings that differ from the parent's, as in the body of POST /runs."
    )
    name: DisplayName = ""


@router.get("/{run_id}/status", response=RunStatus, summary="Progress and time left")
def get_status(request: HttpRequest, run_id: str, wait_s: WaitS = 0.0) -> RunStatus:
    """Return how the run is getting on; with `wait_s` once it is over, or the time is.

    404 for a run whose client trains it.
    """
    return _status(access.get_recipe(caller(request), run_id))


@router.post("/{run_id}/pause", response=RunStatus, summary="Pause")
def pause_run(request: HttpRequest, run_id: str) -> RunStatus:
    """Submit no further steps."""
    return _act(request, run_id, recipes.pause)


@router.post("/{run_id}/resume", response=RunStatus, summary="Resume")
def resume_run(request: HttpRequest, run_id: str) -> RunStatus:
    """Go on after a pause or a stop."""
    return _act(request, run_id, recipes.resume)


@router.post("/{run_id}/stop", response=RunStatus, summary="Stop")
def stop_run(request: HttpRequest, run_id: str, body: Annotated[Stop, JsonBody(Stop())]) -> RunStatus:
    """End the run early, with a last checkpoint or without keeping any of its weights."""
    return _act(request, run_id, lambda recipe: recipes.stop(recipe, keep=body.keep))


@router.post("/{run_id}/change", response=RunStatus, summary="Change settings")
def change_run(request: HttpRequest, run_id: str, body: Annotated[Changes, JsonBody(...)]) -> RunStatus:
    """Change settings from the next step on; null puts a learning rate or an interval back at its default."""
    return _act(request, run_id, lambda recipe: _change(recipe, body))


@router.post("/{run_id}/extend", response=RunStatus, summary="Train longer")
def extend_run(request: HttpRequest, run_id: str, body: Annotated[Extend, JsonBody(...)]) -> RunStatus:
    """Train an ended run for more steps."""
    return _act(request, run_id, lambda recipe: recipes.extend(recipe, body.num_steps))


@router.post("/{run_id}/retry", response=RunStatus, summary="Retry")
def retry_run(request: HttpRequest, run_id: str) -> RunStatus:
    """Go on after a failure, from the newest checkpoint."""
    return _act(request, run_id, recipes.retry)


@router.post("/{run_id}/save", response={202: Saving}, summary="Save a checkpoint")
def save_run(request: HttpRequest, run_id: str, body: Annotated[Save, JsonBody(Save())]) -> Status[Saving]:
    """Save a checkpoint after what is submitted already."""
    recipe = access.get_recipe(caller(request), run_id)
    name = recipes.save_now(recipe, name=body.name or "")
    path = ids.CheckpointPath(run_id, Checkpoint.Kind.TRAINING, name)
    return Status(202, Saving(name=name, path=str(path)))


@router.post("/{run_id}/fork", response={201: RunDetail}, summary="Fork")
def fork_run(request: HttpRequest, run_id: str, body: Annotated[Fork, JsonBody(Fork())]) -> Status[RunDetail]:
    """Start a run from one of this run's checkpoints, with its settings and some changed."""
    made = recipes.fork(
        caller(request),
        _checkpoint(request, run_id, body.checkpoint),
        with_optimizer=body.with_optimizer,
        changes=body.changes,
        name=body.name,
        source="rest",
    )
    return Status(201, read(caller(request), made.public_id))


def _change(recipe: Recipe, changes: Changes) -> None:
    if recipe.preparation:
        changes = defaults.decided(changes, SftConfig.model_validate(recipe.config))
    recipes.change(recipe, changes)


def _act(request: HttpRequest, run_id: str, act: Callable[[Recipe], object]) -> RunStatus:
    recipe = access.get_recipe(caller(request), run_id)
    act(recipe)
    return _status(access.get_recipe(caller(request), run_id))


def _status(recipe: Recipe) -> RunStatus:
    status = recipe_status.status_of(recipe)
    values: dict[str, Any] = {**asdict(status), "allowed": sorted(status.allowed)}
    return RunStatus(**values, is_over=status.ended_at is not None)


def _checkpoint(request: HttpRequest, run_id: str, given: str) -> Checkpoint:
    run = access.get_run(caller(request), run_id)
    if given:
        kind, _, name = given.rpartition("/")
        path = ids.parse_checkpoint_id(run_id, kind or Checkpoint.Kind.TRAINING, name)
        return access.get_checkpoint(caller(request), path)
    newest = access.checkpoints_of(caller(request)).filter(run=run, kind=Checkpoint.Kind.TRAINING)
    found = newest.order_by("-step", "-seq").first()
    if found is None:
        raise RequestInvalid("this run has no training checkpoint to start from", place="checkpoint")
    return found
