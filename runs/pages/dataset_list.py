"""The list of datasets, with the uploads that can be gone on with and the place to begin one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from django.conf import settings
from django.core.paginator import Page, Paginator
from django.db.models import F, Max, Prefetch
from django.db.models.functions import Greatest
from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from runs.models import Dataset, DatasetVersion, Upload, User
from runs.pages.policies import signed_in
from runs.services import access, dataset_uses, datasets, disk, uploads

PAGE_SIZE: Final = 100
FILE_TYPES: Final = ".jsonl,.json,.csv,.tsv,.parquet,.txt,.gz,.zst,.ndjson"
State = DatasetVersion.State
# What a state is called on a page, and its colour.
STATE_WORDS: Final[Mapping[str, tuple[str, str]]] = {
    State.CHECKING: ("checking", "busy"),
    State.READY: ("ready", "good"),
    State.NEEDS_MAPPING: ("needs columns", "warn"),
    State.NEEDS_CHOICE: ("has bad rows", "warn"),
    State.FAILED: ("cannot be read", "bad"),
}


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """What the list shows of a dataset; the state and the sizes are those of its newest version."""

    public_id: str
    name: str
    description: str
    kind: str
    num_rows: int | None
    size_bytes: int
    state: str
    tone: str
    progress: float | None
    num_versions: int
    num_runs: int
    changed_at: datetime


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """An upload that can be gone on with, as a page shows it."""

    public_id: str
    filename: str
    size_bytes: int
    offset: int
    share: float
    target: str
    target_name: str
    expires_at: datetime


@signed_in
@require_GET
def dataset_list(request: HttpRequest) -> HttpResponseBase:
    """Show a page of datasets, those that changed last first."""
    user: User = request.user  # type: ignore[assignment]
    pages = Paginator(_by_change(user), PAGE_SIZE)
    page = pages.get_page(request.GET.get("page"))
    rows = _rows(page)
    context = {
        "rows": rows,
        "page": page,
        "num_datasets": pages.count,
        "is_busy": any(row.progress is not None for row in rows),
        "disk": disk.usage(),
        **upload_context(user),
    }
    return render(request, "datasets/dataset_list.html", context)


@signed_in
@require_POST
def take_example(request: HttpRequest) -> HttpResponseBase:
    """Give the user the dataset that comes with mintweb."""
    user: User = request.user  # type: ignore[assignment]
    return redirect("dataset-detail", datasets.sample_dataset(user).dataset.public_id)


def upload_context(user: User, dataset: Dataset | None = None) -> dict[str, Any]:
    """Return what a place for uploads shows: of all datasets, or those for new versions of one."""
    return {
        "unfinished": [
            _unfinished(upload, offset)
            for upload, offset in uploads.unfinished(user)
            if dataset is None or upload.dataset_id == dataset.pk
        ],
        "max_bytes": settings.MAX_UPLOAD_BYTES,
        "file_types": FILE_TYPES,
    }


def _by_change(user: User) -> Any:
    newest = Max(Greatest("versions__created_at", "versions__checked_at"))
    versions = Prefetch("versions", DatasetVersion.objects.defer("report", "mapping"))
    rows = access.datasets_of(user).annotate(changed_at=Greatest(F("created_at"), newest))
    return rows.prefetch_related(versions).order_by("-changed_at", "-id")


def _rows(page: Page[Dataset]) -> list[DatasetRow]:
    found = list(page)
    num_runs = dataset_uses.num_users([dataset.pk for dataset in found])
    return [_row(dataset, num_runs[dataset.pk]) for dataset in found]


def _row(dataset: Dataset, num_runs: int) -> DatasetRow:
    versions = list(dataset.versions.all())
    newest = versions[0]
    state, tone = STATE_WORDS[newest.state]
    is_checking = newest.state == State.CHECKING
    return DatasetRow(
        public_id=dataset.public_id,
        name=dataset.name,
        description=dataset.description,
        kind=str(newest.get_kind_display()).lower() if newest.kind else "",
        num_rows=newest.num_rows or None,
        size_bytes=newest.size_bytes,
        state=state,
        tone=tone,
        progress=newest.progress if is_checking else None,
        num_versions=len(versions),
        num_runs=num_runs,
        changed_at=dataset.changed_at,  # type: ignore[attr-defined]
    )


def _unfinished(upload: Upload, offset: int) -> Unfinished:
    return Unfinished(
        public_id=upload.public_id,
        filename=upload.filename,
        size_bytes=upload.size_bytes,
        offset=offset,
        share=offset / upload.size_bytes,
        target=upload.dataset.public_id if upload.dataset else "",
        target_name=upload.dataset.name if upload.dataset else "",
        expires_at=upload.expires_at,
    )
