"""Where a run was forked from and what was forked from it, and the curves that its own continue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from django.http import HttpRequest, HttpResponseBase, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from runs.models import TrainingRun, User
from runs.pages.policies import signed_in
from runs.services import access, histories, metrics, run_rows

MAX_FORKS: Final = 50
MAX_ANCESTORS: Final = 8
NUM_BUCKETS: Final = 500
NAMES: Final = ("loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_s", "step_time_s")


@dataclass(frozen=True, kw_only=True)
class Relative:
    """A run's parent or fork; `run_id` is empty for a parent that is somebody else's or gone."""

    run_id: str
    title: str
    step: int
    has_optimizer: bool


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """A run's parent and its forks."""

    parent: Relative | None
    forks: list[Relative]
    has_more: bool
    continues: bool


def lineage_of(run: TrainingRun) -> Lineage:
    """Return the run's parent and forks; the run comes from `run_rows.with_facts`."""
    forks = list(
        TrainingRun.objects.filter(parent=run, owner_id=run.owner_id).order_by("parent_step", "pk")[
            : MAX_FORKS + 1
        ]
    )
    return Lineage(
        parent=_parent_of(run) if run.parent_path else None,
        forks=[_relative(fork, fork) for fork in forks[:MAX_FORKS]],
        has_more=len(forks) > MAX_FORKS,
        continues=run.parent is not None and run.continues_parent,
    )


@signed_in
@never_cache
@require_GET
def ancestry(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Return the curves that the run's own go on from, the nearest first: `{"ancestors": [...]}`."""
    user: User = request.user  # type: ignore[assignment]
    run = access.get_run(user, run_id)
    return JsonResponse({"ancestors": [_curves(fork, user) for fork in _line_of(run, user)]})


def _line_of(run: TrainingRun, user: User) -> Iterator[TrainingRun]:
    """Yield the run and its ancestors as long as each goes on where one of the user's own stood."""
    for _ in range(MAX_ANCESTORS):
        if run.parent is None or run.parent.owner_id != user.pk or not run.continues_parent:
            return
        yield run
        run = run.parent


def _curves(fork: TrainingRun, user: User) -> dict[str, Any]:
    parent = fork.parent
    assert parent is not None
    step = fork.parent_step or 0
    up_to_seq = metrics.last_seq(parent) if fork.parent_seq is None else fork.parent_seq
    series = [
        histories.history(
            parent, name, num_buckets=NUM_BUCKETS, weight=0.0, up_to_seq=up_to_seq, to_step=step
        )
        for name in NAMES
    ]
    return {
        "run": parent.public_id,
        "title": run_rows.title_of(parent),
        "step": step,
        "series": [asdict(one) for one in series if one.step],
    }


def _parent_of(run: TrainingRun) -> Relative:
    parent = run.parent
    if parent is None or parent.owner_id != run.owner_id:
        return Relative(
            run_id="", title=run.parent_path, step=run.parent_step or 0, has_optimizer=run.continues_parent
        )
    return _relative(parent, run)


def _relative(shown: TrainingRun, fork: TrainingRun) -> Relative:
    return Relative(
        run_id=shown.public_id,
        title=run_rows.title_of(shown),
        step=fork.parent_step or 0,
        has_optimizer=fork.continues_parent,
    )
