"""The box that talks to weights: on a run's page, and alone on a page of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from django.http import HttpRequest, HttpResponseBase, JsonResponse
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from runs import ids
from runs.models import Checkpoint, DatasetVersion, Recipe, TrainingRun, User
from runs.pages import checkpoints
from runs.pages.checkpoints import CheckpointRow
from runs.pages.policies import signed_in
from runs.schemas.playground import MAX_TARGETS, MAX_TOKENS
from runs.services import access, base_models, run_rows, sampling

MAX_RUNS: Final = 30
MAX_PER_RUN: Final = 50
_TEXT_KINDS: Final = (DatasetVersion.Kind.COMPLETION, DatasetVersion.Kind.TEXT)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Weights to choose; `value` is the target as the socket takes it."""

    value: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Choices that belong together."""

    label: str
    choices: list[Choice]


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What the box starts with.

    Args:
        columns: the values chosen at first, side by side.
        is_chat: whether messages are put as a conversation, or texts are to be continued.
        save_url: where a checkpoint can be asked for; empty where nobody can.
    """

    groups: list[Group]
    columns: list[str]
    is_chat: bool
    save_url: str
    weights_url: str

    @property
    def settings(self) -> dict[str, Any]:
        """The box as its script reads it."""
        groups = [asdict(group) for group in self.groups]
        return {"groups": groups, "columns": self.columns, "maxColumns": MAX_TARGETS}

    @property
    def max_tokens(self) -> int:
        """The longest answer."""
        return MAX_TOKENS


@signed_in
@require_GET
def playground(request: HttpRequest) -> HttpResponseBase:
    """Talk to any base model and any checkpoint."""
    user = _user(request)
    chosen = request.GET.get("checkpoint", "")
    checkpoint = access.get_readable_checkpoint(user, ids.parse_path(chosen)) if chosen else None
    return render(request, "playground/playground.html", {"talk": talk_of(user, checkpoint)})


@signed_in
@never_cache
@require_GET
def weights(request: HttpRequest) -> HttpResponseBase:
    """Return what can be chosen now, `{"groups": [...]}`: of one run, or of all."""
    user = _user(request)
    run_id = request.GET.get("run", "")
    if run_id:
        run = access.get_run(user, run_id)
        groups = _groups_of_run(run, checkpoints.rows_of_run(run))
    else:
        groups = _all_groups(user, None)
    return JsonResponse({"groups": [asdict(group) for group in groups]})


def talk_of_run(run: TrainingRun, saved: Sequence[CheckpointRow]) -> Talk:
    """Return the box of a run's page: its base model beside its current weights; the run comes from `with_facts`."""
    recipe: Recipe | None = getattr(run, "recipe", None)
    return Talk(
        groups=_groups_of_run(run, saved),
        columns=[_of_base(run.base_model), _value(run=run.public_id)],
        is_chat=recipe is None or recipe.dataset_version.kind not in _TEXT_KINDS,
        save_url=reverse("run-save", args=[run.public_id]) if recipe is not None else "",
        weights_url=f"{reverse('playground-weights')}?run={run.public_id}",
    )


def talk_of(user: User, checkpoint: Checkpoint | None) -> Talk:
    """Return the box of a page of its own: the chosen checkpoint, or the newest, beside its base model."""
    if checkpoint is None:
        checkpoint = access.checkpoints_of(user).first()
    if checkpoint is not None:
        columns = [_of_base(checkpoint.run.base_model), _value(checkpoint=sampling.path_of(checkpoint))]
    else:
        columns = [_of_base(info.name) for info in base_models.available() if not info.error][:1]
    return Talk(
        groups=_all_groups(user, checkpoint),
        columns=columns,
        is_chat=True,
        save_url="",
        weights_url=reverse("playground-weights"),
    )


def _groups_of_run(run: TrainingRun, saved: Sequence[CheckpointRow]) -> list[Group]:
    current = Choice(value=_value(run=run.public_id), label="Current weights (newest checkpoint)")
    base = Choice(value=_of_base(run.base_model), label=run.base_model)
    return [
        Group(label="This run", choices=[current, *map(_choice, saved[:MAX_PER_RUN])]),
        Group(label="Base model", choices=[base]),
    ]


def _all_groups(user: User, chosen: Checkpoint | None) -> list[Group]:
    """Return the base models, and the checkpoints of the runs that saved last; the chosen one in any case."""
    bases = [info.name for info in base_models.available() if not info.error]
    groups = [
        Group(label="Base models", choices=[Choice(value=_of_base(name), label=name) for name in bases])
    ]
    saved = _newest_by_run(user)
    if chosen is not None and chosen not in saved.get(chosen.run_id, []):
        title = run_rows.title_of(chosen.run) if chosen.owner_id == user.pk else sampling.path_of(chosen)
        groups.append(_group(title, [chosen]))
    return groups + [_group(run_rows.title_of(of_run[0].run), of_run) for of_run in saved.values()]


def _newest_by_run(user: User) -> dict[int, list[Checkpoint]]:
    """Return the newest checkpoints of the runs that saved last, by run.

    They are the newest of all, so that a person with a million reads no more than one with some hundreds.
    """
    saved: dict[int, list[Checkpoint]] = {}
    for checkpoint in access.checkpoints_of(user)[: MAX_RUNS * MAX_PER_RUN]:
        if checkpoint.run_id in saved or len(saved) < MAX_RUNS:
            saved.setdefault(checkpoint.run_id, []).append(checkpoint)
    return {run_pk: of_run[:MAX_PER_RUN] for run_pk, of_run in saved.items()}


def _group(title: str, saved: Sequence[Checkpoint]) -> Group:
    return Group(label=title, choices=[_choice(checkpoints.row_of(one)) for one in saved])


def _choice(checkpoint: CheckpointRow) -> Choice:
    for_sampling = " for sampling" if checkpoint.kind == Checkpoint.Kind.SAMPLER else ""
    return Choice(
        value=_value(checkpoint=checkpoint.path),
        label=f"{checkpoint.name} (step {checkpoint.step}){for_sampling}",
    )


def _of_base(name: str) -> str:
    return _value(base_model=name)


def _value(**target: str) -> str:
    return json.dumps(target, separators=(",", ":"))


def _user(request: HttpRequest) -> User:
    user: User = request.user  # type: ignore[assignment]
    return user
