"""The caller: who it is, what it takes on disk, and its keys."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from django.db.models import Sum
from django.http import HttpRequest
from ninja import Router, Status
from pydantic import BaseModel, Field, StringConstraints

from runs.models import ApiKey, DatasetVersion
from runs.rest.bodies import JsonBody
from runs.rest.boundary import caller, tells_secret
from runs.rest.paging import Cursor, Limit, Page, page_of
from runs.rest.runs import RequestModel
from runs.schemas.names import DisplayName
from runs.services import access, keys, tallies

router = Router(tags=["account"])

KeyNumber = Annotated[int, Field(ge=1, le=2**62)]


class Me(BaseModel):
    """Whose key this is."""

    username: str
    email: str


class Usage(BaseModel):
    """What is stored, in bytes and numbers."""

    checkpoint_bytes: int
    num_checkpoints: int
    dataset_bytes: int
    num_datasets: int
    num_runs: int


class KeyOut(BaseModel):
    """A key; `prefix` are its first characters after tml-."""

    id: int
    name: str
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


class NewKeyOut(KeyOut):
    """A new key with its secret, which is told this one time."""

    secret: str = Field(description="As REST and the tinker package want it.")
    secret_for_mint: str = Field(description="The same key as the mint package wants it.")


class NewKey(RequestModel):
    """What the key is for."""

    name: Annotated[DisplayName, StringConstraints(min_length=1, max_length=100)]


@router.get("/me", response=Me, summary="Whose key this is")
def get_me(request: HttpRequest) -> Me:
    """Return the owner of the key."""
    return Me(username=caller(request).username, email=caller(request).email)


@router.get("/me/usage", response=Usage, summary="Disk usage")
def get_usage(request: HttpRequest) -> Usage:
    """Return what the caller's checkpoints and datasets take."""
    user = caller(request)
    kept = tallies.total_of(user, tallies.Kind.CHECKPOINTS)
    versions = DatasetVersion.objects.filter(dataset__owner=user)
    return Usage(
        checkpoint_bytes=kept.size_bytes,
        num_checkpoints=kept.num,
        dataset_bytes=int(versions.aggregate(total=Sum("size_bytes"))["total"] or 0),
        num_datasets=access.datasets_of(user).count(),
        num_runs=tallies.total_of(user, tallies.Kind.RUNS).num,
    )


@router.get("/keys", response=Page[KeyOut], summary="List keys")
def list_keys(request: HttpRequest, limit: Limit = 50, cursor: Cursor = None) -> Page[KeyOut]:
    """Return the caller's keys, revoked ones too, newest first."""
    rows = access.keys_of(caller(request))
    return page_of(rows, _key, sort="-id", cursor=cursor, limit=limit, scope="keys")


@router.post("/keys", response={201: NewKeyOut}, summary="Create a key")
@tells_secret
def create_key(request: HttpRequest, body: Annotated[NewKey, JsonBody(...)]) -> Status[NewKeyOut]:
    """Create a key; its secret is in this answer and nowhere else."""
    key, secret = keys.create_key(caller(request), body.name)
    key.refresh_from_db()
    spelled = keys.spellings(secret)
    return Status(
        201,
        NewKeyOut(**_key(key).model_dump(), secret=spelled["tinker"], secret_for_mint=spelled["mint"]),
    )


@router.delete("/keys/{key_id}", response={204: None}, summary="Revoke a key")
def revoke_key(request: HttpRequest, key_id: KeyNumber) -> Status[None]:
    """Make a key worthless; also the one this request is sent with."""
    keys.revoke_key(caller(request), key_id)
    return Status(204, None)


def _key(row: ApiKey) -> KeyOut:
    return KeyOut(
        id=row.pk,
        name=row.name,
        prefix=row.prefix,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
    )
