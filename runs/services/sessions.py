"""SDK sessions: opened by a client process, kept alive by heartbeats, finished once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.db.models.functions import Now

from runs import ids
from runs.models import Session, User


def create_session(
    user: User,
    *,
    tags: Sequence[str] = (),
    user_metadata: Mapping[str, Any] | None = None,
    sdk_version: str = "",
    display_name: str = "",
) -> Session:
    """Open a session for one client process."""
    return Session.objects.create(
        owner=user,
        public_id=ids.new_session_id(),
        tags=list(tags),
        user_metadata=dict(user_metadata or {}),
        sdk_version=sdk_version[:40],
        display_name=display_name,
    )


def heartbeat(session: Session) -> None:
    """Note that the client is alive."""
    Session.objects.filter(pk=session.pk).update(last_heartbeat_at=Now())


def finish(session: Session, reason: str) -> None:
    """Close the session; the first reason stands."""
    Session.objects.filter(pk=session.pk, finished_at=None).update(finished_at=Now(), finish_reason=reason)
