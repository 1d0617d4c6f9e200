"""What `manage.py up` does about programs that supervisord has given up: against a real one, with one program."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from pytest_django import Settings

from mintweb import embedded, programs
from runs.management.commands import up

from .instances import wait_for

CONFIGURATION = """
[supervisord]
nodaemon = true
silent = true
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[unix_http_server]
file = {socket}
[program:web]
command = {folder}/web
autostart = false
startretries = 0
stdout_logfile = {folder}/web.log
"""


@pytest.fixture
def web(settings: Settings, tmp_path: Path) -> Iterator[Path]:
    """Return a program that supervisord has given up: it ends at once."""
    settings.DATA_DIR = settings.LOG_DIR = tmp_path
    embedded.socket_dir(tmp_path).mkdir(mode=0o700)
    program = tmp_path / "web"
    program.write_text("#!/bin/sh\necho no luck\nexit 1\n")
    program.chmod(0o700)
    file = tmp_path / "supervisord.conf"
    file.write_text(CONFIGURATION.format(folder=tmp_path, socket=programs.control_socket()))
    with subprocess.Popen(
        programs._python("supervisor.supervisord", "--configuration", str(file))
    ) as process:
        try:
            up.wait_for_supervisord(process)
            with suppress(up.Refused):  # it may have ended before the answer
                up.ask("startProcess", "web", False)
            wait_for(lambda: up.states() == {"web": "FATAL"}, 60)
            yield program
        finally:
            process.terminate()


def test_a_program_that_was_given_up_is_started_again(web: Path) -> None:
    web.write_text("#!/bin/sh\nexec sleep 1000\n")
    (line,) = up.Restarts().try_all()
    assert line.startswith("web ended 5 times soon after its start, at last with: no luck (see ")
    assert up.states()["web"] in {"STARTING", "RUNNING"}


def test_one_that_cannot_be_started_is_tried_again_later(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.rename(web.with_name("away"))
    monkeypatch.setattr(up, "RETRY_AFTER_S", 3.0)
    restarts = up.Restarts()
    _, line = restarts.try_all()
    assert line.startswith("supervisord cannot do startProcess (NO_FILE: ")
    assert line.endswith("; trying again in 3 s")
    assert list(restarts.try_all()) == []
    web.with_name("away").rename(web)
    wait_for(lambda: len(list(restarts.try_all())) == 1, 60)


def test_a_log_that_was_removed_is_no_obstacle(web: Path) -> None:
    (web.parent / "web.log").unlink()
    assert "at last with: nothing in its log (see " in up.given_up()["web:web"]
