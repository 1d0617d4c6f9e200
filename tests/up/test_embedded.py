"""The databases from wheels: quick to start, durable, and never in each other's way."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from mintweb import embedded

from .instances import ROOT, all_processes, command, is_quiet, wait_for


def test_both_servers_answer_soon(tmp_path: Path) -> None:
    begin = time.monotonic()
    with embedded.running(tmp_path / "data") as (database_url, redis_url):
        assert time.monotonic() - begin < (10 if is_quiet() else 60)
        with psycopg.connect(database_url) as connection:
            assert connection.info.server_version >= 180000
            assert connection.execute("SHOW fsync").fetchone() == ("on",)
            assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
            assert connection.execute(
                "SELECT usesuper FROM pg_user WHERE usename = current_user"
            ).fetchone() == (False,)
        with redis.Redis.from_url(redis_url, decode_responses=True) as client:
            assert client.ping()
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_rows_outlive_a_restart_and_nothing_listens_on_the_network(tmp_path: Path) -> None:
    with embedded.running(tmp_path) as (database_url, _), psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.execute("INSERT INTO kept VALUES (42)")
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
    with embedded.running(tmp_path) as (database_url, _), psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (42,)


def test_a_folder_with_a_long_and_odd_path_works(tmp_path: Path) -> None:
    data_dir = tmp_path / "a b%20c" / ("x" * 90)
    with embedded.running(data_dir, durable=False) as (database_url, redis_url):
        with psycopg.connect(database_url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        with redis.Redis.from_url(redis_url) as client:
            assert client.ping()
    assert embedded.socket_dir(data_dir).parent == Path("/tmp")


def test_only_its_owner_can_reach_the_sockets(tmp_path: Path) -> None:
    with embedded.running(tmp_path / "data", durable=False):
        assert embedded.socket_dir(tmp_path / "data").stat().st_mode & 0o077 == 0
        assert (tmp_path / "data").stat().st_mode & 0o077 == 0


def test_a_second_instance_on_the_folder_is_refused(tmp_path: Path) -> None:
    with (
        embedded.running(tmp_path, durable=False),
        pytest.raises(embedded.EmbeddedServerError, match=f"already running.*process {os.getpid()}"),
        embedded.running(tmp_path, durable=False),
    ):
        pass


def test_the_servers_end_with_a_killed_parent_and_start_again(tmp_path: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; from mintweb.embedded import running\n"
        f"with running(Path({str(tmp_path)!r}), durable=False): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    wait_for(lambda: not [pid for pid in all_processes() if str(tmp_path).encode() in command(pid)], 60)
    with (
        embedded.running(tmp_path, durable=False) as (database_url, _),
        psycopg.connect(database_url) as connection,
    ):
        assert connection.execute("SELECT 1").fetchone() == (1,)


@contextlib.contextmanager
def another_program(*command: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program as the owner of the cluster, to whom alone PostgreSQL pays heed."""
    with subprocess.Popen(
        [*embedded.as_cluster_owner(), *command], stdin=subprocess.PIPE, **options
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("file", ["postgres/postmaster.pid", "run/.s.PGSQL.5432.lock"])
def test_a_pid_file_that_names_another_program_is_no_obstacle(tmp_path: Path, file: str) -> None:
    with embedded.running(tmp_path, durable=False):
        lines = (tmp_path / file).read_text().split("\n")
    with another_program("sleep", "1000") as other:
        (tmp_path / file).write_text("\n".join([str(other.pid), *lines[1:]]))
        with (
            embedded.running(tmp_path, durable=False) as (database_url, _),
            psycopg.connect(database_url) as connection,
        ):
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert other.poll() is None


def test_a_program_that_only_works_in_the_cluster_s_folder_is_left_alone(tmp_path: Path) -> None:
    with embedded.running(tmp_path, durable=False):
        content = (tmp_path / "postgres" / "postmaster.pid").read_text()
    (tmp_path / "postgres" / "postmaster.pid").write_text(content)
    with another_program("sleep", "1000", cwd=tmp_path / "postgres") as other:
        with embedded.running(tmp_path, durable=False):
            pass
        assert other.poll() is None


def test_a_server_that_cannot_be_stopped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 0.3)
    monkeypatch.setattr(embedded, "QUIT_TIMEOUT_S", 0.3, raising=False)
    embedded.prepare_postgres(tmp_path, durable=False)
    (tmp_path / "postgres" / "postmaster.pid").write_text("1\n")
    stubborn = tmp_path / "postgres"
    program = str(shutil.copy("/bin/sh", tmp_path / "run" / "postgres"))
    deaf = "trap '' INT TERM QUIT; echo ready; read line"
    with another_program(program, "-c", deaf, cwd=stubborn, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(embedded.EmbeddedServerError, match=f"process {other.pid}"):
            embedded.prepare_postgres(tmp_path, durable=False)


def test_an_initdb_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "postgres.new").mkdir()
    (tmp_path / "postgres.new" / "PG_VERSION").write_text("18\n")
    with (
        embedded.running(tmp_path, durable=False) as (database_url, _),
        psycopg.connect(database_url) as connection,
    ):
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_cluster_of_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("16\n")
    with (
        pytest.raises(embedded.EmbeddedServerError, match="another PostgreSQL than 18"),
        embedded.running(tmp_path, durable=False),
    ):
        pass
