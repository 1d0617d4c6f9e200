"""`manage.py up`: start everything, say where it is, keep it running, stop it cleanly."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand
from django.db import DatabaseError, connections

from mintweb import embedded, probes, programs
from mintweb.supervision import POLL_S, Supervisor
from runs.exceptions import NotAuthenticated
from runs.services import accounts, keys

GIVE_UP_AFTER_ENDS = 5  # of one program in a row, before everything is ready
REMIND_EVERY_S = 15.0
ASK_EVERY_S = 0.25
OPEN_FILES = 65_536  # one per websocket and long-poll


class StartFailed(Exception):
    """Start-up cannot go on; the message is one sentence."""


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
        except (embedded.EmbeddedServerError, probes.NotAnswering, StartFailed) as error:
            self.stderr.write(f"mintweb: {error}.")
            sys.exit(2)
        except KeyboardInterrupt:
            self._say("stopped")

    def _run(self) -> None:
        supervisor = Supervisor(settings.LOG_DIR, say=self._say)
        databases: list[str] = []
        services: list[str] = []
        try:
            for program in programs.databases():
                databases.append(program.name)
                supervisor.start(program)
            wait_for_databases(supervisor)
            migrate()
            for program in programs.services():
                services.append(program.name)
                supervisor.start(program)
            welcome = welcome_lines()
            connections.close_all()
            self._wait_until_ready(supervisor)
            self.stdout.write(welcome)
            self.stdout.flush()
            while True:
                supervisor.poll()
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            self._say(f"{self._signal_name}: stopping once current operations are finished (again: at once)")
            raise
        finally:
            self._stopping = True
            connections.close_all()
            supervisor.stop(services, hurry=lambda: self._num_interrupts > 1)
            supervisor.stop(databases)

    def _wait_until_ready(self, supervisor: Supervisor) -> None:
        remind_at = time.monotonic() + REMIND_EVERY_S
        while True:
            supervisor.poll()
            failing = supervisor.failing(num_ends=GIVE_UP_AFTER_ENDS)
            if failing is not None:
                raise StartFailed(
                    f"{failing} ended {GIVE_UP_AFTER_ENDS} times while starting, at last with: "
                    f"{supervisor.last_line(failing)[:300]} (see {settings.LOG_DIR / failing}.log)"
                )
            try:
                return probes.check_ready()
            except probes.NotAnswering as error:
                if time.monotonic() > remind_at:
                    self._say(f"still starting: {error}")
                    remind_at += REMIND_EVERY_S
                time.sleep(ASK_EVERY_S)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._num_interrupts += 1
        if not self._stopping:
            self._stopping = True
            self._signal_name = signal.Signals(number).name
            raise KeyboardInterrupt

    def _say(self, line: str) -> None:
        self.stderr.write(f"mintweb: {line}", self.style.NOTICE if self.stderr.isatty() else None)


def wait_for_databases(supervisor: Supervisor) -> None:
    """Return when both databases answer, whether they are ours or given by an address."""
    if settings.EMBEDDED_REDIS:
        embedded.wait_for_redis(settings.DATA_DIR)
    else:
        probes.check_redis()
    if settings.EMBEDDED_POSTGRES:
        embedded.wait_for_postgres(settings.DATA_DIR, is_alive=lambda: supervisor.is_alive("postgres"))
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
    link = accounts.create_login_link(accounts.ensure_admin())
    spellings = keys.spellings(api_key())
    return "\n".join(
        [
            "",
            f"mintweb is ready at {address}",
            f"Log in once with     {address}/login/{link}/",
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
