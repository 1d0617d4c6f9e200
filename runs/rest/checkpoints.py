"""Checkpoints: list, read, download, keep or publish, delete."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from django.db import transaction
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from ninja import Router, Status
from pydantic import BaseModel, Field

from runs import ids
from runs.models import Checkpoint
from runs.rest.bodies import JsonBody
from runs.rest.boundary import caller, check_match
from runs.rest.paging import Cursor, Limit, Page, page_of
from runs.rest.runs import RequestModel
from runs.schemas.names import PathText
from runs.services import access, archives, checkpoints, sampling
from runs.streams import streamed

router = Router(tags=["checkpoints"])

Kind = Literal["weights", "sampler_weights"]
Sort = Literal["created_at", "-created_at", "name", "-name", "step", "-step", "size_bytes", "-size_bytes"]
_ONE = "/runs/{run_id}/checkpoints/{kind}/{name}"


class CheckpointOut(BaseModel):
    """Saved weights. `weights` hold the optimizer's state too, `sampler_weights` do not."""

    path: str = Field(description="Its tinker:// path, as the SDKs and `POST /samples` take it.")
    run_id: str
    kind: Kind
    name: str
    step: int
    size_bytes: int
    is_public: bool = Field(description="Whether every user of this server may read it.")
    created_at: datetime
    expires_at: datetime | None = Field(description="When it is deleted; null when it is kept.")


class ChangeCheckpoint(RequestModel):
    """What to change; what is left out stays."""

    ttl_seconds: Annotated[int, Field(ge=60, le=10 * 365 * 86_400)] | None = Field(
        default=None, description="How long to keep it from now on; null for ever."
    )
    is_public: bool = False


class DeleteCheckpoints(RequestModel):
    """The checkpoints to delete, by their paths."""

    paths: Annotated[list[PathText], Field(min_length=1, max_length=500)]


class Deleted(BaseModel):
    """How many were deleted."""

    num_deleted: int


@router.get("/checkpoints", response=Page[CheckpointOut], summary="List all checkpoints")
def list_checkpoints(
    request: HttpRequest,
    kind: Kind | None = None,
    sort: Sort = "-created_at",
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[CheckpointOut]:
    """Return the checkpoints of all runs."""
    rows = access.checkpoints_of(caller(request))
    if kind is not None:
        rows = rows.filter(kind=kind)
    return page_of(rows, _shown, sort=sort, cursor=cursor, limit=limit, scope="checkpoints")


@router.post("/checkpoints/delete", response=Deleted, summary="Delete many checkpoints")
def delete_checkpoints(request: HttpRequest, body: Annotated[DeleteCheckpoints, JsonBody(...)]) -> Deleted:
    """Delete checkpoints with their files; when one of them does not exist, none is."""
    paths = [ids.parse_path(path, place="paths") for path in dict.fromkeys(body.paths)]
    chosen = [access.get_checkpoint(caller(request), path) for path in paths]
    checkpoints.delete(*chosen)
    return Deleted(num_deleted=len(chosen))


@router.get("/runs/{run_id}/checkpoints", response=Page[CheckpointOut], summary="List a run's checkpoints")
def list_run_checkpoints(
    request: HttpRequest,
    run_id: str,
    kind: Kind | None = None,
    sort: Sort = "-created_at",
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[CheckpointOut]:
    """Return the checkpoints of one run."""
    run = access.get_run(caller(request), run_id)
    rows = access.checkpoints_of(caller(request)).filter(run=run)
    if kind is not None:
        rows = rows.filter(kind=kind)
    return page_of(rows, _shown, sort=sort, cursor=cursor, limit=limit, scope=f"checkpoints {run_id}")


@router.get(_ONE, response=CheckpointOut, summary="Read a checkpoint")
def get_checkpoint(request: HttpRequest, run_id: str, kind: str, name: str) -> CheckpointOut:
    """Return one checkpoint."""
    return _shown(_checkpoint(request, run_id, kind, name))


@router.patch(_ONE, response=CheckpointOut, summary="Keep or publish a checkpoint")
def change_checkpoint(
    request: HttpRequest,
    run_id: str,
    kind: str,
    name: str,
    body: Annotated[ChangeCheckpoint, JsonBody(...)],
) -> CheckpointOut:
    """Set when a checkpoint is deleted, or who may read it."""
    checkpoint = _checkpoint(request, run_id, kind, name)
    with transaction.atomic():
        access.lock(checkpoint)
        check_match(request, _shown(_checkpoint(request, run_id, kind, name)))
        if "ttl_seconds" in body.model_fields_set:
            checkpoints.set_ttl(checkpoint, body.ttl_seconds)
        if "is_public" in body.model_fields_set:
            checkpoints.set_public(checkpoint, is_public=body.is_public)
    return _shown(_checkpoint(request, run_id, kind, name))


@router.delete(_ONE, response={204: None}, summary="Delete a checkpoint")
def delete_checkpoint(request: HttpRequest, run_id: str, kind: str, name: str) -> Status[None]:
    """Delete a checkpoint with its files."""
    checkpoints.delete(_checkpoint(request, run_id, kind, name))
    return Status(204, None)


@router.get(
    f"{_ONE}/download",
    summary="Download the adapter",
    openapi_extra={
        "responses": {
            200: {
                "description": "The archive",
                "content": {"application/x-tar": {"schema": {}}, "application/zip": {"schema": {}}},
            }
        }
    },
)
def download_checkpoint(
    request: HttpRequest, run_id: str, kind: str, name: str, format: Literal["tar", "zip"] = "tar"
) -> HttpResponseBase:
    """Return the adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors in an archive."""
    checkpoint = _checkpoint(request, run_id, kind, name)
    content_type, write = archives.FORMATS[format]
    session, _, number = run_id.partition(":train:")
    return streamed(
        write(checkpoint), content_type=content_type, filename=f"{session[:8]}-{number}-{name}.{format}"
    )


def _checkpoint(request: HttpRequest, run_id: str, kind: str, name: str) -> Checkpoint:
    return access.get_checkpoint(caller(request), ids.parse_checkpoint_id(run_id, kind, name))


def _shown(row: Checkpoint) -> CheckpointOut:
    return CheckpointOut(
        path=sampling.path_of(row),
        run_id=row.run.public_id,
        kind=row.kind,
        name=row.name,
        step=row.step,
        size_bytes=row.size_bytes,
        is_public=row.is_public,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
