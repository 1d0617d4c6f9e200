"""Short questions about what mintweb stands on: is the folder writable, the port free, does a server answer.

Each raises NotAnswering with one sentence that says what to do; asked by `manage.py up` and `manage.py doctor`.
"""

from __future__ import annotations

import errno
import http.client
import os
import socket
import tempfile
from urllib.parse import urlsplit

import psycopg
import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

ANSWER_TIMEOUT_S = 5


class NotAnswering(Exception):
    """Something that mintweb needs is not there; the message says what to do."""


def check_data_folder() -> None:
    """Write, flush and remove a small file in the data folder."""
    try:
        with tempfile.NamedTemporaryFile(dir=settings.DATA_DIR, prefix=".probe") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise NotAnswering(
            f"the data folder {settings.DATA_DIR} cannot be written ({error.strerror}); "
            "repair it or set MINTWEB_DATA_DIR to another folder"
        ) from error


def check_port() -> None:
    """Bind the address that the web server will listen on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.HOST, settings.PORT, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise NotAnswering(f"MINTWEB_HOST is {settings.HOST}, which is no address of this machine") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise NotAnswering(
                f"port {settings.PORT} on {settings.HOST} is in use; "
                "stop the program that has it or set MINTWEB_PORT to another port"
            ) from error
        raise NotAnswering(
            f"port {settings.PORT} on {settings.HOST} cannot be opened ({error.strerror}); "
            "set MINTWEB_HOST or MINTWEB_PORT to another one"
        ) from error


def check_database() -> None:
    """Run one statement on the PostgreSQL of the settings."""
    try:
        with psycopg.connect(settings.DATABASE_URL, connect_timeout=ANSWER_TIMEOUT_S) as connection:
            version = connection.info.server_version
    except psycopg.Error as error:
        if settings.EMBEDDED_POSTGRES:
            raise NotAnswering("the embedded PostgreSQL is not running; start it with make up") from error
        reason = " ".join(str(error).split())[:300]
        raise NotAnswering(
            f"the PostgreSQL of DATABASE_URL does not answer ({reason}); start it or correct the address"
        ) from error
    if version < 140000:
        raise NotAnswering(
            f"the PostgreSQL of DATABASE_URL is version {version // 10000}; it must be 14 or newer"
        )


def check_redis() -> None:
    """Ping the Redis of the settings."""
    try:
        client = redis.Redis.from_url(
            settings.REDIS_URL, socket_timeout=ANSWER_TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )
        with client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        if settings.EMBEDDED_REDIS:
            raise NotAnswering("the embedded Redis is not running; start it with make up") from error
        reason = " ".join(str(error).split())[:300]
        raise NotAnswering(
            f"the Redis of REDIS_URL does not answer ({reason}); start it or correct the address"
        ) from error


def check_ready() -> None:
    """Ask the running web server whether all of mintweb is ready."""
    address = urlsplit(local_address())
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=ANSWER_TIMEOUT_S)
    try:
        connection.request("GET", "/health/ready", headers={"Host": _allowed_host(address.netloc)})
        response = connection.getresponse()
        body = response.read(2000).decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise NotAnswering(f"the web server at {address.netloc} does not answer yet ({error})") from error
    finally:
        connection.close()
    if response.status != 200:
        raise NotAnswering(f"GET /health/ready answers {response.status}: {' '.join(body.split())[:300]}")


def local_address() -> str:
    """Return the web server's address as seen from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.HOST, settings.HOST)  # noqa: S104 - compared
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.PORT}"


def public_address() -> str:
    """Return the address that people and SDKs use."""
    return settings.PUBLIC_URL or local_address()


def _allowed_host(host: str) -> str:
    name = host.rpartition(":")[0]
    if name in settings.ALLOWED_HOSTS or "*" in settings.ALLOWED_HOSTS or not settings.ALLOWED_HOSTS:
        return host
    return str(settings.ALLOWED_HOSTS[0]).removeprefix(".")
