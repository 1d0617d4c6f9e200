"""Runs: list, read, start, rename, delete."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Query, Router, Status
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from runs.models import TrainingRun, User
from runs.rest.bodies import JsonBody
from runs.rest.boundary import caller, check_match
from runs.rest.paging import Cursor, Limit, Page, page_of
from runs.rest.rendering import Number
from runs.schemas.names import DisplayName
from runs.schemas.recipes import SftConfig
from runs.schemas.waits import WaitS
from runs.services import access, recipe_checks, recipes, run_deletion, training_runs
from runs.services.training_runs import DisplayState

router = Router(tags=["runs"])

StateName = Literal[
    "preparing",
    "queued",
    "running",
    "stopping",
    "paused",
    "recovering",
    "held_up",
    "waiting_for_worker",
    "waiting_for_client",
    "parked",
    "finished",
    "stopped",
    "failed",
]
Source = Literal["sdk", "browser", "rest"]
Sort = Literal["created_at", "-created_at", "name", "-name", "step", "-step", "num_tokens", "-num_tokens"]
SearchText = Annotated[str, StringConstraints(max_length=200)]
_SOURCE: Final = TrainingRun.Source.REST


class RequestModel(BaseModel):
    """A JSON body: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Lora(BaseModel):
    """The adapter that is trained."""

    rank: int
    alpha: float
    train_attn: bool
    train_mlp: bool
    train_unembed: bool


class Parent(BaseModel):
    """Where a fork started; `run_id` is null when that run was deleted."""

    run_id: str | None
    step: int | None
    path: str


class RunSummary(BaseModel):
    """A run as lists show it."""

    id: str
    name: str
    source: Source
    state: StateName
    error: str
    base_model: str
    lora: Lora
    step: int
    num_tokens: int
    loss: Number
    tokens_per_s: Number
    created_at: datetime
    last_active_at: datetime | None
    parent: Parent | None


class RunDetail(RunSummary):
    """A run with the settings it trains with; those of a run whose client trains it are null."""

    recipe_state: str | None
    num_steps: int | None
    best_step: int | None
    dataset: str | None = Field(description="The dataset version it trains on, as ds-...@N.")
    config: dict[str, Any] | None
    started_config: dict[str, Any] | None
    user_metadata: dict[str, Any]


class StartRun(SftConfig):
    """Settings as in the form and the YAML file; what is left out is decided by the rules."""

    name: DisplayName = ""


class RenameRun(RequestModel):
    """A new name; empty for none."""

    name: DisplayName


@router.get("", response=Page[RunSummary], summary="List runs")
def list_runs(
    request: HttpRequest,
    state: StateName | None = None,
    source: Source | None = None,
    base_model: SearchText | None = None,
    name: Annotated[SearchText | None, Query(description="A part of the name, in any case.")] = None,
    sort: Sort = "-created_at",
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[RunSummary]:
    """Return the runs of all sources, newest first unless sorted otherwise."""
    rows = _runs(caller(request))
    if state is not None:
        rows = training_runs.in_display_state(rows, DisplayState(state.replace("_", " ")))
    if source is not None:
        rows = rows.filter(source=source)
    if base_model is not None:
        rows = rows.filter(base_model=base_model)
    if name is not None:
        rows = rows.filter(name__icontains=name)
    return page_of(rows, summary_of, sort=sort, cursor=cursor, limit=limit, scope="runs")


@router.post("", response={201: RunDetail}, summary="Start a run")
def start_run(request: HttpRequest, body: Annotated[StartRun, JsonBody(...)]) -> Status[RunDetail]:
    """Start a run on a dataset; it waits for its turn behind those that started before."""
    values = body.model_dump(mode="json", exclude={"name"}, exclude_unset=True)
    run = recipes.start(caller(request), recipe_checks.parse_config(values), name=body.name, source=_SOURCE)
    return Status(201, read(caller(request), run.public_id))


@router.get("/{run_id}", response=RunDetail, summary="Read a run")
def get_run(request: HttpRequest, run_id: str, wait_s: WaitS = 0.0) -> RunDetail:
    """Return one run with its settings; with `wait_s` once it is finished, stopped or failed, or the time is over."""
    return read(caller(request), run_id)


@router.patch("/{run_id}", response=RunDetail, summary="Rename a run")
def rename_run(request: HttpRequest, run_id: str, body: Annotated[RenameRun, JsonBody(...)]) -> RunDetail:
    """Give the run another name."""
    run = access.get_run(caller(request), run_id)
    with transaction.atomic():
        access.lock(run)
        check_match(request, read(caller(request), run_id))
        training_runs.rename(run, body.name)
    return read(caller(request), run_id)


@router.delete("/{run_id}", response={204: None}, summary="Delete a run")
def delete_run(request: HttpRequest, run_id: str) -> Status[None]:
    """Delete the run with its checkpoints, metrics and samples; a run that trains must be stopped before."""
    run_deletion.delete(access.get_run(caller(request), run_id))
    return Status(204, None)


def read(user: User, run_id: str) -> RunDetail:
    """Return the user's run as a single object."""
    access.get_run(user, run_id)
    return detail_of(_runs(user).get(public_id=run_id))


def summary_of(run: TrainingRun) -> RunSummary:
    """Return a run from `with_activity` as lists show it."""
    return RunSummary(**_summary(run))


def detail_of(run: TrainingRun) -> RunDetail:
    """Return a run from `with_activity` with its settings."""
    recipe = getattr(run, "recipe", None)
    return RunDetail(
        **_summary(run),
        recipe_state=recipe and recipe.state,
        num_steps=(recipe and recipe.num_steps) or None,
        best_step=recipe and recipe.best_step,
        dataset=recipe and recipe_checks.ref_of(recipe.dataset_version),
        config=recipe and recipe.config,
        started_config=recipe and recipe.started_config,
        user_metadata=run.user_metadata,
    )


def _summary(run: TrainingRun) -> dict[str, Any]:
    recipe = getattr(run, "recipe", None)
    lora = Lora(
        rank=run.lora_rank,
        alpha=run.lora_alpha,
        train_attn=run.train_attn,
        train_mlp=run.train_mlp,
        train_unembed=run.train_unembed,
    )
    return {
        "id": run.public_id,
        "name": run.name,
        "source": run.source,
        "state": training_runs.display_state(run).value.replace(" ", "_"),
        "error": run.error or (recipe.error if recipe is not None else ""),
        "base_model": run.base_model,
        "lora": lora,
        "step": run.step,
        "num_tokens": run.num_tokens,
        "loss": run.loss,
        "tokens_per_s": run.tokens_per_s,
        "created_at": run.created_at,
        "last_active_at": run.last_applied_at,
        "parent": _parent(run),
    }


def _parent(run: TrainingRun) -> Parent | None:
    if not run.parent_path:
        return None
    parent = run.parent
    return Parent(run_id=parent and parent.public_id, step=run.parent_step, path=run.parent_path)


def _runs(user: User) -> QuerySet[TrainingRun]:
    rows = training_runs.with_activity(access.runs_of(user))
    return rows.select_related("parent", "recipe__dataset_version__dataset").defer(
        "recipe__dataset_version__report"
    )
