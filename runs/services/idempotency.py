"""Requests that may be sent again: the first answer to an Idempotency-Key stands for a day."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from django.db import connection, transaction
from django.db.models.functions import Now

from runs.exceptions import RequestInvalid, StillAnswering
from runs.models import IdempotentReply, User
from runs.services.advisory_locks import LockClass

LIFETIME: Final = timedelta(hours=24)
_PATIENCE_S: Final = 10.0
_LOOK_S: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A status and a body; `is_replay` when it is that of an earlier request."""

    status: int
    body: bytes
    is_replay: bool = False

    @property
    def is_success(self) -> bool:
        """Whether the request did what it asked for."""
        return 200 <= self.status < 300


def once(
    user: User, key: str, *, digest: str, answer: Callable[[], Answer], is_atomic: bool = True
) -> Answer:
    """Answer a request, or return what the first one with this key was answered.

    Only a success is kept: a request that was refused has done nothing, so its key stays free. A second
    request that comes while the first is being answered waits for it.

    Args:
        digest: of the request; the same key with another is a mistake of the client.
        is_atomic: let the effect and the kept answer be one transaction, so that a crash leaves both or none.
    Raises:
        RequestInvalid: the key came with another request.
        StillAnswering: the first request takes too long.
    """
    with _only_one(user, key):
        kept = IdempotentReply.objects.filter(owner=user, key=key, created_at__gt=Now() - LIFETIME).first()
        if kept is not None:
            return _replay(kept, digest)
        if not is_atomic:
            given = answer()
            _keep(user, key, digest, given)
            return given
        with transaction.atomic():
            given = answer()
            if given.is_success:
                _keep(user, key, digest, given)
            else:
                transaction.set_rollback(True)
        return given


def forget_old() -> None:
    """Delete what is kept longer than promised."""
    IdempotentReply.objects.filter(created_at__lte=Now() - LIFETIME).delete()


def _keep(user: User, key: str, digest: str, given: Answer) -> None:
    if given.is_success:
        IdempotentReply.objects.filter(owner=user, key=key).delete()
        IdempotentReply.objects.create(
            owner=user, key=key, request_digest=digest, status=given.status, body=given.body
        )


def _replay(kept: IdempotentReply, digest: str) -> Answer:
    if kept.request_digest != digest:
        raise RequestInvalid(
            "this key came with another request before; use a new key for a new request",
            place="Idempotency-Key",
        )
    return Answer(status=kept.status or 200, body=bytes(kept.body or b""), is_replay=True)


@contextmanager
def _only_one(user: User, key: str) -> Iterator[None]:
    """Hold a lock that the database frees when this process dies."""
    number = int.from_bytes(hashlib.sha256(f"{user.pk} {key}".encode()).digest()[:4], "big", signed=True)
    deadline = time.monotonic() + _PATIENCE_S
    while not _call("pg_try_advisory_lock", number):
        if time.monotonic() > deadline:
            raise StillAnswering
        time.sleep(_LOOK_S)
    try:
        yield
    finally:
        _call("pg_advisory_unlock", number)


def _call(function: str, number: int) -> bool:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {function}(%s, %s)", [LockClass.IDEMPOTENCY_KEY, number])
        return bool(cursor.fetchone()[0])
