"""Addresses of PostgreSQL and Redis, in the spelling of each library that uses them."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

from django.core.exceptions import ImproperlyConfigured

# A process that freezes inside a transaction holds its locks, and with them a run, until the server ends its session.
FROZEN_AFTER_S: Final = 30
# A connection whose other end has vanished is given up within about ten seconds; sockets of this machine ignore these.
_VANISHED: Final = {
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}


def parse_database_url(url: str) -> dict[str, Any]:
    """Return Django's DATABASES entry for postgresql://user:password@host:port/name?option=value.

    A unix socket is given as ?host=/directory; other query items become libpq options (sslmode, ...).
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ImproperlyConfigured(f"DATABASE_URL cannot be parsed: {error}.") from None
    if parts.scheme not in {"postgres", "postgresql"}:
        raise ImproperlyConfigured(
            f"DATABASE_URL starts with {parts.scheme or 'nothing'}://; only postgresql:// is supported."
        )
    name = unquote(parts.path.removeprefix("/"))
    if not name:
        raise ImproperlyConfigured("DATABASE_URL names no database; use postgresql://user@host/name.")
    options: dict[str, Any] = {
        "connect_timeout": "5",
        **_VANISHED,
        "options": f"-c idle_in_transaction_session_timeout={FROZEN_AFTER_S}s",
        **dict(parse_qsl(parts.query)),
    }
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": options.pop("host", "") or unquote(parts.hostname or ""),
        "PORT": str(options.pop("port", "") or port or ""),
        "OPTIONS": options,
        "CONN_MAX_AGE": None,
        "CONN_HEALTH_CHECKS": True,
        "ATOMIC_REQUESTS": False,
    }


def redis_database(url: str, offset: int) -> str:
    """Return the same Redis address with its database number raised by offset."""
    try:
        parts = urlsplit(url)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        number = int(query.pop("db", "") or (parts.path.strip("/") if parts.scheme != "unix" else "") or 0)
    except ValueError:
        raise ImproperlyConfigured(
            "REDIS_URL cannot be parsed; use redis://host:6379/0 or unix:///path?db=0."
        ) from None
    if parts.scheme == "unix":
        return f"unix://{parts.netloc}{parts.path}?{urlencode({**query, 'db': number + offset})}"
    if parts.scheme in {"redis", "rediss"}:
        return parts._replace(path=f"/{number + offset}", query=urlencode(query)).geturl()
    raise ImproperlyConfigured(
        f"REDIS_URL starts with {parts.scheme or 'nothing'}://; use redis://, rediss:// or unix://."
    )


def broker_address(url: str) -> str:
    """Return a redis-py address in kombu's spelling, which has its own scheme for sockets."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    number = query.pop("db", "0")
    user_info, at, _ = parts.netloc.rpartition("@")
    return f"redis+socket://{user_info}{at}{parts.path}?{urlencode({'virtual_host': number, **query})}"
