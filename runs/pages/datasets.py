"""A dataset's page: what the doctor found, what it asks, rows as they are trained on, versions.

A form works without JavaScript: it leads back to the page with a message. Asked for JSON, the same address
answers 200 with a message, or the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from django.contrib import messages
from django.http import HttpRequest, HttpResponseBase, JsonResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.http import urlencode
from django.views.decorators.http import require_GET, require_POST

from runs.datasets.problems import FileRefused
from runs.exceptions import RequestInvalid
from runs.models import Dataset, DatasetVersion, TrainingRun, User
from runs.pages import dataset_columns, dataset_preview, dataset_report
from runs.pages.dataset_list import STATE_WORDS, upload_context
from runs.pages.policies import signed_in
from runs.services import access, dataset_uses, datasets, run_rows

MAX_USERS: Final = 20
State = DatasetVersion.State


@dataclass(frozen=True, kw_only=True)
class UserRow:
    """A run that uses a dataset."""

    run_id: str
    title: str


@signed_in
@require_GET
def dataset_detail(request: HttpRequest, dataset_id: str) -> HttpResponseBase:
    """Show a dataset's newest version, or the one that the address names."""
    user = _user(request)
    dataset = access.get_dataset(user, dataset_id)
    versions = list(dataset.versions.defer("report"))
    version = access.get_dataset_version(user, dataset_id, _wanted(request, versions))
    state, tone = STATE_WORDS[version.state]
    context = {
        "dataset": dataset,
        "version": version,
        "ref": f"{dataset.public_id}@{version.number}",
        "state": state,
        "tone": tone,
        "is_newest": version.number == versions[0].number,
        "versions": [(one, *STATE_WORDS[one.state]) for one in versions],
        "size_bytes": sum(one.size_bytes for one in versions),
        "report": dataset_report.report_of(version) if version.state != State.CHECKING else None,
        "mapper": dataset_columns.mapper_of(version),
        "parts": dataset_columns.PARTS,
        "is_trainable": version.state == State.READY and version.kind in ("chat", "completion", "text"),
        **_users(dataset),
        **_preview(request, version),
        **upload_context(user, dataset),
    }
    return render(request, "datasets/dataset_detail.html", context)


@signed_in
@require_POST
def edit(request: HttpRequest, dataset_id: str) -> HttpResponseBase:
    """Give a dataset another name and description."""
    dataset = access.get_dataset(_user(request), dataset_id)
    datasets.rename(dataset, request.POST.get("name", ""))
    datasets.describe(dataset, request.POST.get("description", ""))
    return _done(request, "The dataset was changed.", reverse("dataset-detail", args=[dataset_id]))


@signed_in
@require_POST
def delete(request: HttpRequest, dataset_id: str) -> HttpResponseBase:
    """Delete a dataset with all its versions and files, unless runs use it."""
    dataset = access.get_dataset(_user(request), dataset_id)
    datasets.delete(dataset)
    messages.success(request, f"Dataset {dataset.name} was deleted.")
    return _to(request, reverse("dataset-list"))


@signed_in
@require_POST
def skip(request: HttpRequest, dataset_id: str, number: int) -> HttpResponseBase:
    """Go on without the rows that are wrong."""
    datasets.skip_bad_rows(_version(request, dataset_id, number))
    return _done(request, "The bad rows are left out.", _address(dataset_id, number))


@signed_in
@require_POST
def choose_columns(request: HttpRequest, dataset_id: str, number: int) -> HttpResponseBase:
    """Say which column holds what; `column` and `part` come as pairs."""
    version = _version(request, dataset_id, number)
    pairs = zip(request.POST.getlist("part"), request.POST.getlist("column"), strict=False)
    mapping: dict[str, str] = {}
    for part, column in pairs:
        if part and part in mapping:
            raise RequestInvalid(
                f"{part[:40]} is given to two columns, {mapping[part][:80]!r} and {column[:80]!r}; choose one"
            )
        mapping |= {part: column} if part else {}
    try:
        datasets.choose_mapping(version, mapping)
    except FileRefused as error:
        raise RequestInvalid(f"{error.problem.reason}; {error.problem.fix}") from error
    return _done(request, "The file is read again with these columns.", _address(dataset_id, number))


@signed_in
@require_POST
def choose_encoding(request: HttpRequest, dataset_id: str, number: int) -> HttpResponseBase:
    """Read the file in the encoding that the doctor guessed."""
    datasets.choose_encoding(_version(request, dataset_id, number), request.POST.get("encoding", ""))
    return _done(request, "The file is read again in this encoding.", _address(dataset_id, number))


@signed_in
@require_POST
def check_again(request: HttpRequest, dataset_id: str, number: int) -> HttpResponseBase:
    """Check a file once more that could not be read."""
    datasets.check_again(_version(request, dataset_id, number))
    return _done(request, "The file is checked again.", _address(dataset_id, number))


def _preview(request: HttpRequest, version: DatasetVersion) -> dict[str, Any]:
    if version.state != State.READY:
        return {"preview": None}
    preview = dataset_preview.preview_of(version, request.GET)
    kept = {"version": version.number, **dataset_preview.query_of(preview.choice)}
    return {
        "preview": preview,
        "previous_query": urlencode({**kept, "row": preview.previous_row}),
        "next_query": urlencode({**kept, "row": preview.next_row}),
    }


def _wanted(request: HttpRequest, versions: Sequence[DatasetVersion]) -> int:
    """Return the number of the version that the address names; one that is no number names none."""
    text = request.GET.get("version", "")
    if not text:
        return versions[0].number
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 0


def _version(request: HttpRequest, dataset_id: str, number: int) -> DatasetVersion:
    return access.get_dataset_version(_user(request), dataset_id, number)


def _users(dataset: Dataset) -> dict[str, Any]:
    num_users = dataset_uses.num_users([dataset.pk])[dataset.pk]
    users = [_user_row(run) for run in dataset_uses.users_of(dataset, limit=MAX_USERS)]
    return {"users": users, "num_users": num_users, "num_more_users": max(num_users - len(users), 0)}


def _user_row(run: TrainingRun) -> UserRow:
    return UserRow(run_id=run.public_id, title=run_rows.title_of(run))


def _address(dataset_id: str, number: int) -> str:
    return f"{reverse('dataset-detail', args=[dataset_id])}?version={number}"


def _done(request: HttpRequest, message: str, address: str) -> HttpResponseBase:
    if _wants_json(request):
        return JsonResponse({"detail": message})
    messages.success(request, message)
    return redirect(address)


def _to(request: HttpRequest, address: str) -> HttpResponseBase:
    return JsonResponse({"url": address}) if _wants_json(request) else redirect(address)


def _wants_json(request: HttpRequest) -> bool:
    return request.headers.get("accept", "").startswith("application/json")


def _user(request: HttpRequest) -> User:
    user: User = request.user  # type: ignore[assignment]
    return user
