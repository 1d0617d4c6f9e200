"""Checkpoints: the rows of their tables; downloaded, kept or deleted. `checkpoint_list` is the page of them all."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from django.contrib import messages
from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import redirect
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.http import require_GET, require_POST

from runs import ids
from runs.exceptions import NotFound, RequestInvalid
from runs.models import Checkpoint, TrainingRun, User
from runs.pages import deletions
from runs.pages.policies import signed_in
from runs.services import access, archives, checkpoint_facts, run_rows, sampling
from runs.services import checkpoints as service
from runs.services.checkpoint_facts import CheckpointFacts
from runs.streams import streamed

MAX_ROWS: Final = 500
# So many of a run's checkpoints are shown on its page.
NUM_OF_RUN: Final = 100
LIFETIMES: Final = ((86_400, "1 day"), (7 * 86_400, "7 days"), (30 * 86_400, "30 days"), (0, "for ever"))


@dataclass(frozen=True, kw_only=True)
class CheckpointRow:
    """What a table shows of a checkpoint; `can_go_on` with the optimizer's state, at the step where it was saved."""

    pk: int
    run_id: str
    run_title: str
    kind: str
    kind_label: str
    name: str
    step: int
    size_bytes: int
    created_at: datetime
    expires_at: datetime | None
    path: str
    is_public: bool
    can_go_on: bool
    loss: float | None
    validation_loss: float | None
    is_best: bool


@signed_in
@require_GET
def download(request: HttpRequest, run_id: str, kind: str, name: str) -> HttpResponseBase:
    """Send the adapter's files as a tar archive, while they are read."""
    path = ids.parse_checkpoint_id(run_id, kind, name)
    checkpoint = access.get_checkpoint(_user(request), path)
    session, _, number = run_id.partition(":train:")
    return streamed(
        archives.tar(checkpoint),
        content_type="application/x-tar",
        filename=f"{session[:8]}-{number}-{checkpoint.name}.tar",
    )


@signed_in
@require_POST
def delete(request: HttpRequest, run_id: str, kind: str, name: str) -> HttpResponseBase:
    """Delete a checkpoint with its files."""
    checkpoint = access.get_checkpoint(_user(request), ids.parse_checkpoint_id(run_id, kind, name))
    service.delete(checkpoint)
    deletions.tell(request, "checkpoint", num_deleted=1)
    return _back(request)


@signed_in
@require_POST
def delete_many(request: HttpRequest) -> HttpResponseBase:
    """Delete the chosen checkpoints with their files."""
    chosen, num_gone = [], 0
    for path in request.POST.getlist("path")[:MAX_ROWS]:
        try:
            chosen.append(access.get_checkpoint(_user(request), ids.parse_path(path)))
        except NotFound:  # deleted since the page was made, by its run for one
            num_gone += 1
    service.delete(*chosen)
    deletions.tell(request, "checkpoint", num_deleted=len(chosen), num_gone=num_gone)
    return _back(request)


@signed_in
@require_POST
def keep(request: HttpRequest, run_id: str, kind: str, name: str) -> HttpResponseBase:
    """Set how long a checkpoint is kept from now on."""
    checkpoint = access.get_checkpoint(_user(request), ids.parse_checkpoint_id(run_id, kind, name))
    chosen = request.POST.get("seconds", "")
    labels = {str(seconds): label for seconds, label in LIFETIMES}
    if chosen not in labels:
        raise RequestInvalid(f"must be one of {', '.join(labels)}", place="seconds")
    service.set_ttl(checkpoint, int(chosen) or None)
    messages.success(request, f"Checkpoint {checkpoint.name} is kept {_how_long(labels[chosen])}.")
    return _back(request)


def rows_of_run(run: TrainingRun, *, limit: int = MAX_ROWS) -> list[CheckpointRow]:
    """Return the rows of the newest checkpoints that a person named in this run."""
    named = Checkpoint.objects.filter(run=run, is_ephemeral=False).select_related("run")
    return rows_of(named[:limit])


def version_of(rows: Sequence[CheckpointRow], num_all: int) -> str:
    """Return a word that changes whenever a table of the newest of so many does; once a minute for what it says of times."""
    shown = hashlib.blake2b(repr((rows, num_all)).encode(), digest_size=8).hexdigest()
    return f"{shown}-{int(time.time()) // 60}"


def row_of(checkpoint: Checkpoint, facts: CheckpointFacts = checkpoint_facts.UNKNOWN) -> CheckpointRow:
    """Return what a table shows of a checkpoint that comes with its run."""
    return CheckpointRow(
        pk=checkpoint.pk,
        run_id=checkpoint.run.public_id,
        run_title=run_rows.title_of(checkpoint.run),
        kind=checkpoint.kind,
        kind_label=Checkpoint.Kind(checkpoint.kind).label,
        name=checkpoint.name,
        step=checkpoint.step,
        size_bytes=checkpoint.size_bytes,
        created_at=checkpoint.created_at,
        expires_at=checkpoint.expires_at,
        path=sampling.path_of(checkpoint),
        is_public=checkpoint.is_public,
        can_go_on=checkpoint.kind == Checkpoint.Kind.TRAINING,
        loss=facts.loss,
        validation_loss=facts.validation_loss,
        is_best=facts.is_best,
    )


def rows_of(checkpoints: Iterable[Checkpoint]) -> list[CheckpointRow]:
    """Return what a table shows of checkpoints that come with their runs; one query for what they were worth."""
    listed = list(checkpoints)
    facts = checkpoint_facts.facts_of(listed)
    return [row_of(checkpoint, facts.get(checkpoint.pk, checkpoint_facts.UNKNOWN)) for checkpoint in listed]


def _back(request: HttpRequest) -> HttpResponseBase:
    target = request.POST.get("next", "")
    is_ours = url_has_allowed_host_and_scheme(target, allowed_hosts=None) and target.startswith("/")
    return redirect(target if is_ours else "checkpoint-list")


def _how_long(label: str) -> str:
    return label if label.startswith("for") else f"for {label}"


def _user(request: HttpRequest) -> User:
    user: User = request.user  # type: ignore[assignment]
    return user
