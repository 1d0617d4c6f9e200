"""Datasets: upload, read, page through the rows, answer the doctor's questions, delete."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from django.db import transaction
from django.db.models import Prefetch, prefetch_related_objects
from django.http import HttpRequest
from ninja import Query, Router, Status
from pydantic import BaseModel, Field, StringConstraints

from runs.exceptions import NotFound, RequestInvalid
from runs.models import Dataset, DatasetVersion
from runs.rest.bodies import JsonBody
from runs.rest.boundary import caller, check_match, takes_upload, upload_of
from runs.rest.paging import Cursor, Limit, Page, page_of
from runs.rest.runs import RequestModel, SearchText
from runs.schemas.waits import WaitS
from runs.services import access, blobs, datasets

router = Router(tags=["datasets"])

VersionNumber = Annotated[int, Field(ge=1, le=999_999)]
Sort = Literal["created_at", "-created_at", "name", "-name"]
_PREVIEW_ROWS: Final = 100
_FILE: Final = {"schema": {"type": "string", "format": "binary"}}
_FORM: Final = {
    "schema": {
        "type": "object",
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "filename": {"type": "string"},
            "name": {"type": "string"},
            "description": {"type": "string"},
        },
        "required": ["file"],
    }
}
_UPLOAD: Final[dict[str, Any]] = {
    "parameters": [
        {"in": "query", "name": name, "required": False, "schema": {"type": "string"}, "description": text}
        for name, text in (
            (
                "filename",
                "Its end says what the file is: .jsonl .ndjson .json .csv .tsv .parquet .txt, also .gz or .zst",
            ),
            ("name", "The dataset's name; the file's when left out."),
            ("description", "What it is."),
        )
    ],
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": _FILE, "multipart/form-data": _FORM},
    },
}


class VersionOut(BaseModel):
    """One content of a dataset. It can be trained on when it is `ready`."""

    ref: str = Field(description="What names it in a run's settings: ds-...@N.")
    number: int
    state: Literal["checking", "ready", "needs_mapping", "needs_choice", "failed"]
    error: str
    kind: str = Field(description="chat, completion, text, preference or prompts; empty until it is known.")
    filename: str
    digest: str = Field(description="SHA-256 of the file.")
    size_bytes: int
    num_rows: int
    num_bad_rows: int
    progress: float = Field(description="How much of it is checked, 0 to 1.")
    mapping: dict[str, str]
    skip_bad_rows: bool
    created_at: datetime
    checked_at: datetime | None


class DatasetOut(BaseModel):
    """A dataset with its newest version."""

    id: str
    name: str
    description: str
    num_versions: int
    newest: VersionOut | None
    created_at: datetime


class Uploaded(BaseModel):
    """What became of an uploaded file; it is being checked now."""

    id: str
    version: VersionOut


class ReportOut(BaseModel):
    """What the doctor found in the file."""

    ref: str
    state: str
    report: dict[str, Any]


class Rows(BaseModel):
    """Rows as they are trained on."""

    items: list[dict[str, Any]]
    start: int
    num_rows: int


class ChangeDataset(RequestModel):
    """What to change; what is left out stays."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    description: Annotated[str, StringConstraints(max_length=10_000)] | None = None


class Mapping(RequestModel):
    """Which column plays which role, as {"prompt": "question", "completion": "answer"}."""

    mapping: Annotated[dict[str, Annotated[str, StringConstraints(max_length=200)]], Field(max_length=20)]


@router.get("", response=Page[DatasetOut], summary="List datasets")
def list_datasets(
    request: HttpRequest,
    name: Annotated[SearchText | None, Query(description="A part of the name, in any case.")] = None,
    sort: Sort = "-created_at",
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[DatasetOut]:
    """Return the datasets."""
    rows = access.datasets_of(caller(request)).prefetch_related(_versions())
    if name is not None:
        rows = rows.filter(name__icontains=name)
    return page_of(rows, _dataset, sort=sort, cursor=cursor, limit=limit, scope="datasets")


@router.post("", response={201: Uploaded}, summary="Upload a dataset", openapi_extra=_UPLOAD)
@takes_upload
def upload_dataset(request: HttpRequest) -> Status[Uploaded]:
    """Make a dataset of a file, sent as the body itself or as the part `file` of a form.

    The same content again is the dataset that is there already. Very large files are better sent in parts,
    by the tus protocol, to /rest/v1/uploads/.
    """
    return Status(201, _create(request, None))


@router.get("/{dataset_id}", response=DatasetOut, summary="Read a dataset")
def get_dataset(request: HttpRequest, dataset_id: str) -> DatasetOut:
    """Return one dataset."""
    return _read(request, dataset_id)


@router.patch("/{dataset_id}", response=DatasetOut, summary="Rename or describe a dataset")
def change_dataset(
    request: HttpRequest, dataset_id: str, body: Annotated[ChangeDataset, JsonBody(...)]
) -> DatasetOut:
    """Change a dataset's name or description."""
    dataset = access.get_dataset(caller(request), dataset_id)
    with transaction.atomic():
        access.lock(dataset)
        check_match(request, _read(request, dataset_id))
        if body.name is not None:
            datasets.rename(dataset, body.name)
        if body.description is not None:
            datasets.describe(dataset, body.description)
    return _read(request, dataset_id)


@router.delete("/{dataset_id}", response={204: None}, summary="Delete a dataset")
def delete_dataset(request: HttpRequest, dataset_id: str) -> Status[None]:
    """Delete a dataset with its versions and files; refused while runs use it."""
    datasets.delete(access.get_dataset(caller(request), dataset_id))
    return Status(204, None)


@router.get("/{dataset_id}/versions", response=Page[VersionOut], summary="List versions")
def list_versions(
    request: HttpRequest, dataset_id: str, limit: Limit = 50, cursor: Cursor = None
) -> Page[VersionOut]:
    """Return a dataset's versions, newest first."""
    rows = access.get_dataset(caller(request), dataset_id).versions.select_related("dataset").defer("report")
    return page_of(rows, _version, sort="-number", cursor=cursor, limit=limit, scope=f"versions {dataset_id}")


@router.post(
    "/{dataset_id}/versions", response={201: Uploaded}, summary="Upload a version", openapi_extra=_UPLOAD
)
@takes_upload
def upload_version(request: HttpRequest, dataset_id: str) -> Status[Uploaded]:
    """Add a version to a dataset."""
    return Status(201, _create(request, access.get_dataset(caller(request), dataset_id)))


@router.get("/{dataset_id}/versions/{number}", response=VersionOut, summary="Read a version")
def get_version(
    request: HttpRequest, dataset_id: str, number: VersionNumber, wait_s: WaitS = 0.0
) -> VersionOut:
    """Return one version; with `wait_s` once it is no longer `checking`, or the time is over."""
    return _version(_find(request, dataset_id, number))


@router.get("/{dataset_id}/versions/{number}/report", response=ReportOut, summary="The doctor's report")
def get_report(request: HttpRequest, dataset_id: str, number: VersionNumber) -> ReportOut:
    """Return what was found in the file: columns, problems by line, lengths."""
    version = _find(request, dataset_id, number)
    return ReportOut(ref=_ref(version), state=version.state, report=version.report)


@router.get("/{dataset_id}/versions/{number}/rows", response=Rows, summary="Rows")
def list_rows(
    request: HttpRequest,
    dataset_id: str,
    number: VersionNumber,
    start: Annotated[int, Field(ge=0, le=2**53)] = 0,
    limit: Annotated[int, Field(ge=1, le=_PREVIEW_ROWS)] = 20,
) -> Rows:
    """Return rows of a ready version by number, as they are trained on."""
    version = _find(request, dataset_id, number)
    if version.state != DatasetVersion.State.READY:
        raise RequestInvalid(
            f"{_ref(version)} is {version.state}, not ready: it has no rows yet", place="state"
        )
    with datasets.open_rows(version) as rows:
        return Rows(items=rows.slice(start, start + limit), start=start, num_rows=len(rows))


@router.put("/{dataset_id}/versions/{number}/mapping", response=VersionOut, summary="Name the columns")
def choose_mapping(
    request: HttpRequest, dataset_id: str, number: VersionNumber, body: Annotated[Mapping, JsonBody(...)]
) -> VersionOut:
    """Say which column plays which role; the version is then checked again."""
    datasets.choose_mapping(_find(request, dataset_id, number), body.mapping)
    return _version(_find(request, dataset_id, number))


@router.post(
    "/{dataset_id}/versions/{number}/skip-bad-rows", response=VersionOut, summary="Leave out bad rows"
)
def skip_bad_rows(request: HttpRequest, dataset_id: str, number: VersionNumber) -> VersionOut:
    """Make a version ready without the rows that are wrong."""
    datasets.skip_bad_rows(_find(request, dataset_id, number))
    return _version(_find(request, dataset_id, number))


def _create(request: HttpRequest, dataset: Dataset | None) -> Uploaded:
    upload = upload_of(request)
    with blobs.room():
        version = datasets.create_version(
            caller(request),
            path=upload.path,
            filename=upload.filename,
            dataset=dataset,
            name=upload.fields.get("name", ""),
            description=upload.fields.get("description", ""),
        )
    return Uploaded(id=version.dataset.public_id, version=_version(version))


def _read(request: HttpRequest, dataset_id: str) -> DatasetOut:
    """Return a dataset as it is stored now."""
    dataset = access.get_dataset(caller(request), dataset_id)
    prefetch_related_objects([dataset], _versions())
    return _dataset(dataset)


def _versions() -> Prefetch[str]:
    """Have the versions at hand without their reports, which may be large."""
    return Prefetch("versions", DatasetVersion.objects.defer("report"))


def _find(request: HttpRequest, dataset_id: str, number: int) -> DatasetVersion:
    versions = access.get_dataset(caller(request), dataset_id).versions.select_related("dataset")
    version = versions.filter(number=number).first()
    if version is None:
        raise NotFound(f"there is no version {number} of {dataset_id[:40]!r}")
    return version


def _ref(version: DatasetVersion) -> str:
    return f"{version.dataset.public_id}@{version.number}"


def _dataset(row: Dataset) -> DatasetOut:
    versions = list(row.versions.all())
    return DatasetOut(
        id=row.public_id,
        name=row.name,
        description=row.description,
        num_versions=len(versions),
        newest=_version(versions[0]) if versions else None,
        created_at=row.created_at,
    )


def _version(row: DatasetVersion) -> VersionOut:
    return VersionOut(
        ref=_ref(row),
        number=row.number,
        state=row.state,
        error=row.error,
        kind=row.kind,
        filename=row.filename,
        digest=row.digest,
        size_bytes=row.size_bytes,
        num_rows=row.num_rows,
        num_bad_rows=row.num_bad_rows,
        progress=row.progress,
        mapping=row.mapping,
        skip_bad_rows=row.skip_bad_rows,
        created_at=row.created_at,
        checked_at=row.checked_at,
    )
