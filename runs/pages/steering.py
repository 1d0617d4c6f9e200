"""Steering of a run that needs no code: what may be done now, and the forms that do it.

A form works without JavaScript: it leads back to the run's page with a message. Asked for JSON, the
same address answers 200 with a message, or the error with the place of each problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from django.contrib import messages
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, QueryDict
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_POST

from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, Recipe, TrainingRun, User
from runs.pages import recipe_settings
from runs.pages.checkpoints import CheckpointRow
from runs.pages.policies import signed_in
from runs.pages.recipe_settings import Group
from runs.recipes import config_files
from runs.schemas.parsing import validate_object
from runs.schemas.recipes import MAX_PROMPTS, MAX_STEPS, Changes
from runs.services import access, recipe_checks, recipes
from runs.services.recipe_status import RecipeStatus

SCHEDULES: Final = ("constant", "linear", "cosine")
_NUMBERS: Final = ("learning_rate", "num_steps", "eval_every", "save_every")
_MAX_FORK_POINTS: Final = 100
Act = Callable[[Recipe, QueryDict], str]


@dataclass(frozen=True, kw_only=True)
class ForkPoint:
    """A checkpoint that a new run may start from."""

    name: str
    step: int
    path: str
    has_optimizer: bool


@dataclass(frozen=True, kw_only=True)
class ChangeForm:
    """The settings that may change while the run trains, as they are."""

    learning_rate: str
    schedule: str
    num_steps: int | None
    eval_every: int | None
    save_every: int | None
    prompts: list[str]


@dataclass(frozen=True, kw_only=True)
class Steering:
    """What the page offers for a recipe.

    Args:
        allowed: actions whose buttons are shown.
        saves_at: the step of the checkpoint that a stop would save; None before the first step.
        retry_note: where a failed run would go on from, or why it cannot.
    """

    allowed: frozenset[str]
    state: str
    step: int
    num_steps: int
    saves_at: int | None
    num_checkpoints: int
    retry_step: int
    retry_note: str
    form: ChangeForm
    schedules: tuple[str, ...]
    max_steps: int
    max_prompts: int
    fork_points: list[ForkPoint]
    settings: list[Group]
    num_changed: int


def steering_of(
    recipe: Recipe, status: RecipeStatus, checkpoints: Sequence[CheckpointRow], *, num_checkpoints: int
) -> Steering:
    """Return what may be done with the recipe's run now; `checkpoints` are the newest of the run's."""
    settings = recipe_settings.groups_of(recipe)
    can_retry, retry_step, retry_note = _retry_of(recipe) if "retry" in status.allowed else (False, 0, "")
    return Steering(
        allowed=status.allowed if can_retry else status.allowed - {"retry"},
        state=status.state,
        step=status.step,
        num_steps=status.num_steps,
        saves_at=recipe.next_step if recipe.next_step > recipe.first_step else None,
        num_checkpoints=num_checkpoints,
        retry_step=retry_step,
        retry_note=retry_note,
        form=_form_of(recipe),
        schedules=SCHEDULES,
        max_steps=MAX_STEPS,
        max_prompts=MAX_PROMPTS,
        fork_points=[_fork_point(checkpoint) for checkpoint in checkpoints[:_MAX_FORK_POINTS]],
        settings=settings,
        num_changed=recipe_settings.num_changed(settings),
    )


@signed_in
@require_GET
def export(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Return the run's settings, as steering has made them, as a YAML file that starts the same run."""
    user: User = request.user  # type: ignore[assignment]
    recipe = access.get_recipe(user, run_id)
    text = config_files.to_yaml(recipe_checks.parse_config(recipe.config), name=recipe.run.name)
    response = HttpResponse(text, content_type="application/yaml; charset=utf-8")
    session, _, number = run_id.partition(":train:")
    response["Content-Disposition"] = f'attachment; filename="run-{session[:8]}-{number}.yaml"'
    return response


# -- actions -------------------------------------------------------------------------------------------


@signed_in
@require_POST
def pause(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Pause the run."""
    return _act(request, run_id, _pause)


@signed_in
@require_POST
def resume(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Go on after a pause or a stop."""
    return _act(request, run_id, _resume)


@signed_in
@require_POST
def stop(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """End the run, with its weights or without."""
    return _act(request, run_id, _stop)


@signed_in
@require_POST
def save(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Save a checkpoint now."""
    return _act(request, run_id, _save)


@signed_in
@require_POST
def change(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Change settings."""
    return _act(request, run_id, _change)


@signed_in
@require_POST
def extend(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Train for more steps."""
    return _act(request, run_id, _extend)


@signed_in
@require_POST
def retry(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Go on after a failure."""
    return _act(request, run_id, _retry)


def changes_of(form: Mapping[str, Any], prompts: list[str], config: Mapping[str, Any]) -> Changes:
    """Return the settings of the form that differ from the run's; a field that was not sent stays.

    Raises:
        RequestInvalid: names each field that is wrong.
    """
    given: dict[str, Any] = {}
    for name in _NUMBERS:
        text, held = form.get(name), config.get(name)
        if text is not None and text.strip() != ("" if held is None else str(held)):
            given[name] = text.strip()
    if form.get("schedule") not in (None, config["schedule"]):
        given["schedule"] = form["schedule"]
    kept = [prompt for prompt in prompts if prompt]
    if "has_prompts" in form and kept != config["samples"]["prompts"]:
        given["samples"] = {**config["samples"], "prompts": kept}
    return validate_object(Changes, given)


def _pause(recipe: Recipe, _form: QueryDict) -> str:
    recipes.pause(recipe)
    return "The run pauses after the steps that are on their way."


def _resume(recipe: Recipe, _form: QueryDict) -> str:
    recipes.resume(recipe)
    return "The run goes on as soon as it is its turn."


def _stop(recipe: Recipe, form: QueryDict) -> str:
    keep = form.get("keep", "")
    if keep not in ("yes", "no"):
        raise RequestInvalid(f"must be yes or no, got {keep[:20]!r}", place="keep")
    recipes.stop(recipe, keep=keep == "yes")
    if keep == "yes":
        return "The run stops; its weights are kept."
    return "The run stops; its weights are deleted."


def _save(recipe: Recipe, _form: QueryDict) -> str:
    return f"Checkpoint {recipes.save_now(recipe)} is saved as soon as its step is done."


def _change(recipe: Recipe, form: QueryDict) -> str:
    prompts = [text.replace("\r\n", "\n").strip() for text in form.getlist("prompt")]
    changes = changes_of(form, prompts, recipe.config)
    recipes.change(recipe, changes)
    names = ", ".join(name.replace("_", " ") for name in sorted(changes.given()))
    return f"Changed from the next step on: {names}."


def _extend(recipe: Recipe, form: QueryDict) -> str:
    text = form.get("num_steps", "").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise RequestInvalid(f"must be a whole number, got {text[:20]!r}", place="num_steps")
    recipes.extend(recipe, int(text))
    return f"The run goes on for {int(text)} more steps."


def _retry(recipe: Recipe, _form: QueryDict) -> str:
    recipes.retry(recipe)
    return "The run goes on as soon as it is its turn."


def _act(request: HttpRequest, run_id: str, act: Act) -> HttpResponseBase:
    user: User = request.user  # type: ignore[assignment]
    recipe = access.get_recipe(user, run_id)
    wants_json = request.headers.get("accept", "").startswith("application/json")
    try:
        message = act(recipe, request.POST)
    except RequestInvalid as error:
        if wants_json:
            problems = [{"place": place, "message": text} for place, text in error.problems]
            return JsonResponse({"detail": str(error), "problems": problems}, status=error.http_status)
        messages.error(request, f"This did not work: {error}.")
        return redirect("run-detail", run_id=run_id)
    if wants_json:
        return JsonResponse({"detail": message})
    messages.success(request, message)
    return redirect("run-detail", run_id=run_id)


def _retry_of(recipe: Recipe) -> tuple[bool, int, str]:
    """Return whether a retry is possible, the step it starts from, and that in words."""
    point = recipes.retry_point(recipe)
    is_open = recipe.run.state == TrainingRun.State.OPEN
    if point is not None and is_open:
        note = f"Retry goes on from checkpoint {point.name}; later steps are trained again."
        return True, point.step, note
    if is_open and recipe.next_step <= recipe.first_step:
        return True, recipe.first_step, "No step was trained yet, so a retry starts from the beginning."
    return False, 0, "There is no checkpoint to go on from; start the same run again instead."


def _form_of(recipe: Recipe) -> ChangeForm:
    config = recipe.config
    rate = config.get("learning_rate")
    return ChangeForm(
        learning_rate="" if rate is None else str(rate),
        schedule=config["schedule"],
        num_steps=config.get("num_steps"),
        eval_every=config.get("eval_every"),
        save_every=config.get("save_every"),
        prompts=list(config["samples"]["prompts"]),
    )


def _fork_point(checkpoint: CheckpointRow) -> ForkPoint:
    return ForkPoint(
        name=checkpoint.name,
        step=checkpoint.step,
        path=checkpoint.path,
        has_optimizer=checkpoint.kind == Checkpoint.Kind.TRAINING,
    )
