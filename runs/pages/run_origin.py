"""Where a new run's settings start from: nothing, another run, a dataset, or a checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from runs import ids
from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, DatasetVersion, Recipe, TrainingRun, User
from runs.pages import run_form
from runs.schemas.recipes import SftConfig
from runs.services import (
    access,
    base_models,
    data_starts,
    datasets,
    recipe_checks,
    run_rows,
    sampling,
)
from runs.services.data_starts import BEGINNING, DataStart

OPTIMIZER: Final = "fork.optimizer"


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A checkpoint that the new run starts from; base model and adapter are given by it.

    Args:
        run_id: the run that saved it; empty for another person's, whose `title` is the path alone.
    """

    checkpoint: Checkpoint
    run_id: str
    title: str
    has_optimizer: bool
    with_optimizer: bool

    @property
    def first_step(self) -> int:
        """Return the step at which the new run starts to count."""
        return self.checkpoint.step if self.with_optimizer else 0

    def data_start(self, config: SftConfig, version: DatasetVersion) -> DataStart:
        """Return where the new run begins in its data."""
        return data_starts.of_fork(self.checkpoint, config, version) if self.with_optimizer else BEGINNING

    def bound(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings with what the checkpoint decides."""
        run = self.checkpoint.run
        return {**values, "base_model": run.base_model, "lora": recipe_checks.adapter_of(run)}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a new run's form shows at first, and what it is compared with.

    Args:
        values: by place, as `run_form.flat` gives them.
        run: the run whose settings these are, if any; `title` is its name.
    """

    values: dict[str, list[str]]
    run: TrainingRun | None = None
    title: str = ""
    fork: Fork | None = None
    problems: tuple[tuple[str, str], ...] = ()


def origin_of(user: User, query: Mapping[str, str], *, form: run_form.Values | None = None) -> Origin:
    """Return what `?from=`, `?fork=` or `?dataset=` ask for.

    Args:
        form: a form that was sent; it says whether a fork takes the optimizer's state with it.
    Raises:
        NotFound: there is no such run or checkpoint, or it is not the user's.
        RequestInvalid: `fork` is no path of a checkpoint.
    """
    if query.get("fork"):
        return _forked(user, query, form)
    if query.get("from"):
        run = access.get_run(user, query["from"])
        return Origin(
            values={**run_form.DEFAULTS, **_settings_of(run)}, run=run, title=run_rows.title_of(run)
        )
    values = {**run_form.DEFAULTS, "base_model": [_first_base_model()]}
    if not query.get("dataset"):
        return Origin(values=values)
    try:
        version = datasets.get_ready_version(user, query["dataset"][:40])
    except RequestInvalid as error:
        return Origin(values=values, problems=error.problems)
    return Origin(values={**values, "dataset": [recipe_checks.ref_of(version)]})


def _forked(user: User, query: Mapping[str, str], form: run_form.Values | None) -> Origin:
    checkpoint = access.get_readable_checkpoint(user, ids.parse_path(query["fork"], place="fork"))
    run = checkpoint.run
    has_optimizer = checkpoint.kind == Checkpoint.Kind.TRAINING
    asked = form[OPTIMIZER][-1] == "true" if form and form.get(OPTIMIZER) else query.get("optimizer") != "0"
    is_own = run.owner_id == user.pk
    fork = Fork(
        checkpoint=checkpoint,
        run_id=run.public_id if is_own else "",
        title=run_rows.title_of(run) if is_own else sampling.path_of(checkpoint),
        has_optimizer=has_optimizer,
        with_optimizer=has_optimizer and asked,
    )
    # Another person's published weights may be trained on; their settings, data and prompts stay theirs.
    settings = _settings_of(run, started=False) if is_own else {}
    values = {**run_form.DEFAULTS, **settings, **_shape_of(run)}
    if fork.with_optimizer:
        values |= _longer(values, checkpoint.step)
    return Origin(values=values, fork=fork)


def _settings_of(run: TrainingRun, *, started: bool = True) -> dict[str, list[str]]:
    """Return the settings a run was started with, or has come to; of a client's run all that is known."""
    recipe = Recipe.objects.filter(run=run).first()
    if recipe is None:
        return _shape_of(run)
    return run_form.flat(recipe.started_config if started else recipe.config)


def _shape_of(run: TrainingRun) -> dict[str, list[str]]:
    return {
        place: texts
        for place, texts in run_form.flat(
            {"base_model": run.base_model, "lora": recipe_checks.adapter_of(run)}
        ).items()
        if place == "base_model" or place.startswith("lora.")
    }


def _longer(values: Mapping[str, list[str]], step: int) -> dict[str, list[str]]:
    """Return an end for a run that goes on at a step: as many steps again if it had reached its own."""
    end = int(values["num_steps"][0]) if values.get("num_steps") else 0
    if end > step:
        return {}
    return {run_form.LENGTH: ["steps"], "num_steps": [str(step + (end or step or 100))], "num_epochs": []}


def _first_base_model() -> str:
    infos = base_models.available()
    chosen = next((info for info in infos if info.is_loaded), infos[0] if infos else None)
    return chosen.name if chosen is not None else ""
