"""SDK sessions: opened by a client process, kept alive by heartbeats, finished once.

How long a client has been silent is measured on the server's own clock, which stands still while the server is
down: an outage must not make it look as if every client had gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

from django.db import connection
from django.db.models import Q, QuerySet, Subquery, Value
from django.db.models.functions import Coalesce, Now
from django.utils import timezone

from runs import ids
from runs.models import ServerClock, Session, User

TICK_S: Final = 15
# Clients send a heartbeat every 10 s; one that was silent for so long is gone.
SILENT_S: Final = 900
# Of the reasons for which a client closes its session the one that is no mishap.
SUCCESS: Final = "success"
_CLOCK_PK: Final = 1
# After an outage the first tick counts no more than two ordinary ones.
_TICK = """
INSERT INTO runs_serverclock (id, uptime_s) VALUES (%s, 0)
ON CONFLICT (id) DO UPDATE SET seen_at = clock_timestamp(), uptime_s = runs_serverclock.uptime_s
  + GREATEST(LEAST(EXTRACT(EPOCH FROM clock_timestamp() - runs_serverclock.seen_at), %s), 0)
"""


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
        heard_uptime_s=_uptime(),
    )


def heartbeat(session: Session) -> None:
    """Note that the client is alive."""
    Session.objects.filter(pk=session.pk).update(last_heartbeat_at=Now(), heard_uptime_s=_uptime())


def finish(session: Session, reason: str) -> None:
    """Close the session; the first reason stands."""
    Session.objects.filter(pk=session.pk, finished_at=None).update(finished_at=Now(), finish_reason=reason)


def tick() -> None:
    """Move the server's clock on; called every `TICK_S` by each process that hears clients."""
    with connection.cursor() as cursor:
        cursor.execute(_TICK, [_CLOCK_PK, 2 * TICK_S])


def silent() -> QuerySet[Session]:
    """Return the open sessions of clients that have vanished; they may come back."""
    return Session.objects.filter(_is_silent_for(timedelta(seconds=SILENT_S)))


def over() -> QuerySet[Session]:
    """Return the sessions of clients that are not there: they closed them, or have vanished."""
    return Session.objects.filter(Q(finished_at__isnull=False) | _is_silent_for(timedelta(seconds=SILENT_S)))


def past(*, finished: timedelta, silent: timedelta) -> QuerySet[Session]:
    """Return the sessions that were closed so long ago, or whose clients have been silent for so long."""
    return Session.objects.filter(Q(finished_at__lt=timezone.now() - finished) | _is_silent_for(silent))


def _is_silent_for(time: timedelta) -> Q:
    return Q(finished_at=None, heard_uptime_s__lte=_uptime() - Value(time.total_seconds()))


def _uptime() -> Coalesce:
    clock = ServerClock.objects.filter(pk=_CLOCK_PK).values("uptime_s")
    return Coalesce(Subquery(clock), Value(0.0))
