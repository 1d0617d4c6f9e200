"""`manage.py up`: start everything, say where it is, keep it running, stop it cleanly."""

from __future__ import annotations

import http.client
import os
import re
import resource
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import BaseCommand
from django.db import DatabaseError, connections
from supervisor.childutils import getRPCInterface

from mintweb import embedded, probes, programs
from runs.exceptions import NotAuthenticated
from runs.management.commands.create_user import login_address
from runs.services import accounts, keys

REMIND_EVERY_S = 15.0
# supervisord notices that a program ended when it is asked something, else within two seconds.
ASK_EVERY_S = 0.25
# As long as supervisord's own tries take until it gives a program up.
RETRY_AFTER_S = float(sum(range(1, programs.NUM_RETRIES + 1)))
LOUD_LINE = re.compile(rb"^[\d:, -]{19,23} (WARNING |ERROR |CRITICAL |WARN exited: |WARN killing )")
OPEN_FILES = 65_536  # one per websocket and long-poll


class StartFailed(Exception):
    """Start-up cannot go on; the message is one sentence."""


class Refused(probes.NotAnswering):
    """supervisord has answered that it cannot do what it was asked to."""


class Command(BaseCommand):
    """Start mintweb in the foreground; there are no arguments, every choice is a setting."""

    help = "Start the databases, the web server and the workers; Ctrl-C stops all of them."
    requires_system_checks = []

    def handle(self, *args: Any, **options: Any) -> None:
        """Run until a signal asks for the end."""
        self._num_interrupts = 0
        self._stopping = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._interrupt)
        allow_many_connections()
        try:
            probes.check_data_folder()
            with embedded.exclusive(settings.DATA_DIR):
                probes.check_port()
                self._say(f"starting; data and logs are in {settings.DATA_DIR}")
                self._run()
        except (
            ImproperlyConfigured,
            embedded.EmbeddedServerError,
            probes.NotAnswering,
            StartFailed,
        ) as error:
            self.stderr.write(f"mintweb: {error}.")
            sys.exit(2)
        except KeyboardInterrupt:
            self._say("stopped")

    def _run(self) -> None:
        command = programs.supervisord()
        self._num_bytes_read = {log: log.stat().st_size for log in settings.LOG_DIR.glob("*.log")}
        # From the main thread: it ends with the thread that started it. In a session of its own: out of Ctrl-C's reach.
        supervisord = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            wait_for_supervisord(supervisord)
            wait_for_databases()
            migrate()
            ask("startProcessGroup", "services", False)
            welcome = welcome_lines()
            connections.close_all()
            self._wait_until_ready()
            self.stdout.write(welcome)
            self.stdout.flush()
            restarts = Restarts()
            while True:
                self._watch()
                for line in restarts.try_all():
                    self._say(line)
        except KeyboardInterrupt:
            self._say(f"{self._signal_name}: stopping once current operations are finished (again: at once)")
            raise
        finally:
            self._stopping = True
            connections.close_all()
            with suppress(probes.NotAnswering):
                self._stop("services")
                self._stop("databases")
                ask("shutdown")
            supervisord.terminate()
            supervisord.wait()

    def _wait_until_ready(self) -> None:
        remind_at = time.monotonic() + REMIND_EVERY_S
        while True:
            self._watch()
            for reason in given_up().values():
                raise StartFailed(reason)
            try:
                return probes.check_ready()
            except probes.NotAnswering as error:
                if time.monotonic() > remind_at:
                    self._say(f"still starting: {error}")
                    remind_at += REMIND_EVERY_S

    def _watch(self) -> None:
        self._repeat_warnings()
        time.sleep(ASK_EVERY_S)

    def _stop(self, group: str) -> None:
        if not states(group):
            return
        ask("stopProcessGroup", group, False)
        while {"STARTING", "RUNNING", "STOPPING"} & set(states(group).values()):
            if group == "services" and self._num_interrupts > 1:
                ask("signalProcessGroup", group, "KILL")
            self._repeat_warnings()
            time.sleep(0.05)

    def _repeat_warnings(self) -> None:
        for log in settings.LOG_DIR.glob("*.log"):
            with suppress(FileNotFoundError), log.open("rb") as file:  # a log may be turned at any time
                begin = self._num_bytes_read.get(log, 0)
                begin = begin if begin <= os.fstat(file.fileno()).st_size else 0
                file.seek(begin)
                lines = [line for line in file if line.endswith(b"\n")]
                self._num_bytes_read[log] = begin + sum(map(len, lines))
                for line in filter(LOUD_LINE.match, lines):
                    self._say(f"{log.stem}: {line.decode('utf-8', errors='replace').rstrip()[:300]}")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._num_interrupts += 1
        if not self._stopping:
            self._stopping = True
            self._signal_name = signal.Signals(number).name
            raise KeyboardInterrupt

    def _say(self, line: str) -> None:
        self.stderr.write(f"mintweb: {line}", self.style.NOTICE if self.stderr.isatty() else None)


class Restarts:
    """Starts again what supervisord has given up; what it cannot even start waits between two tries."""

    def __init__(self) -> None:
        self._not_before: dict[str, float] = {}

    def try_all(self) -> Iterator[str]:
        """Start what is due, and tell of each try what a person should know.

        Raises:
            NotAnswering: supervisord is gone.
        """
        for name, reason in given_up().items():
            if time.monotonic() >= self._not_before.get(name, 0.0):
                yield f"{reason}; starting it again"
                yield from self._try(name)

    def _try(self, name: str) -> Iterator[str]:
        try:
            ask("startProcess", name, False)
        except Refused as error:
            self._not_before[name] = time.monotonic() + RETRY_AFTER_S
            yield f"{error}; trying again in {RETRY_AFTER_S:.0f} s"


def ask(method: str, *arguments: object) -> Any:
    """Call a method of supervisord; they are listed at http://supervisord.org/api.html.

    Raises:
        Refused: it cannot do that.
        NotAnswering: it is gone.
    """
    try:
        with getRPCInterface({"SUPERVISOR_SERVER_URL": f"unix://{programs.control_socket()}"}) as server:
            return getattr(server.supervisor, method)(*arguments)
    except xmlrpc.client.Fault as error:
        raise Refused(f"supervisord cannot do {method} ({error.faultString})") from error
    except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
        raise probes.NotAnswering(
            f"supervisord does not answer ({error}); see {settings.LOG_DIR / 'supervisord.log'}"
        ) from error


def states(group: str = "") -> dict[str, str]:
    """Return the state in which supervisord holds each program, of one group or all."""
    infos = ask("getAllProcessInfo")
    return {info["name"]: info["statename"] for info in infos if group in {"", info["group"]}}


def given_up() -> dict[str, str]:
    """Return the programs that supervisord no longer starts, as group:name, and why."""
    reasons = {}
    for info in ask("getAllProcessInfo"):
        if info["statename"] == "FATAL":
            log = settings.LOG_DIR / f"{info['name']}.log"
            reasons[f"{info['group']}:{info['name']}"] = (
                f"{info['name']} ended {programs.NUM_RETRIES + 1} times soon after its start, at last with: "
                f"{last_line(log)[:300]} (see {log})"
            )
    return reasons


def last_line(log: Path) -> str:
    """Return the end of a log, which may be turned or removed at any time."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    return text.strip().rpartition("\n")[2] or "nothing in its log"


def wait_for_supervisord(process: subprocess.Popen[bytes]) -> None:
    """Return when it answers."""
    while process.poll() is None:
        with suppress(probes.NotAnswering):
            ask("getState")
            return
        time.sleep(0.02)
    raise StartFailed(f"supervisord does not start; see {settings.LOG_DIR / 'supervisord.log'}")


def wait_for_databases() -> None:
    """Return when both databases answer, whether they are ours or given by an address."""
    if settings.EMBEDDED_REDIS:
        embedded.wait_for_redis(settings.DATA_DIR)
    else:
        probes.check_redis()
    if settings.EMBEDDED_POSTGRES:
        embedded.wait_for_postgres(
            settings.DATA_DIR, is_alive=lambda: states()["postgres"] not in {"BACKOFF", "FATAL"}
        )
    else:
        probes.check_database()


def migrate() -> None:
    """Bring the tables up to date."""
    try:
        call_command("migrate", verbosity=0, interactive=False)
    except DatabaseError as error:
        raise StartFailed(
            f"the tables cannot be brought up to date ({' '.join(str(error).split())})"
        ) from error


def allow_many_connections() -> None:
    """Raise the limit of open files, which every process started from here inherits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def welcome_lines() -> str:
    """Return what people need to begin: the address, a fresh login link and the SDK's variables."""
    address = probes.public_address()
    spellings = keys.spellings(api_key())
    return "\n".join(
        [
            "",
            f"mintweb is ready at {address}",
            f"Log in once with     {login_address(accounts.ensure_admin())}",
            "",
            "For a MinT or Tinker program:",
            f"  export MINT_BASE_URL={address} MINT_API_KEY={spellings['mint']}",
            f"  export TINKER_BASE_URL={address} TINKER_API_KEY={spellings['tinker']}",
            "",
            "Ctrl-C stops everything.",
            "",
        ]
    )


def api_key() -> str:
    """Return the key of the settings, else the one kept in the data folder, made anew if it no longer works."""
    keys.ensure_key_from_settings()
    if settings.API_KEY:
        return str(settings.API_KEY)
    file = Path(settings.DATA_DIR) / "api_key"
    if file.exists():
        secret = file.read_text(encoding="ascii").strip()
        try:
            keys.authenticate(secret)
        except NotAuthenticated:
            pass
        else:
            return secret
    _, secret = keys.create_key(accounts.ensure_admin(), "made by make up")
    draft = file.with_suffix(".new")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_text(secret + "\n", encoding="ascii")
    os.replace(draft, file)
    return secret
