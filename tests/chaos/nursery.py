"""Gives birth to web servers and GPU workers by fork, after importing everything they need once.

A killed process is so replaced in a tenth of a second instead of five, and a minute holds as many faults as an
hour would. Each child is a process of its own, with connections, threads and memory of its own; only its imports
are its parent's. Reads orders as JSON lines, writes `born` and `dead` lines.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging.config
import os
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import django

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the driver closes the pipe."""
    _import_everything()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    _say({"ready": True})
    unread = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.02)
        _report_dead()
        if not readable:
            continue
        received = os.read(0, 65536)
        if not received:
            os._exit(0)
        *lines, unread = (unread + received).split(b"\n")
        for line in lines:
            _bear(json.loads(line))


def _import_everything() -> None:
    """Load what a child needs, so that it is at work a moment after its birth; starts no thread."""
    django.setup()
    for module in (
        "celery.apps.worker",
        "celery.bin.celery",
        "celery.concurrency.solo",
        "uvicorn.protocols.http.httptools_impl",
        "gpuworker.worker",
        "mintweb.asgi",
        "mintweb.celery",
        "tests.chaos.engine",
    ):
        importlib.import_module(module)


def _bear(order: dict[str, Any]) -> None:
    pid = os.fork()
    if pid:
        _say({"born": pid, "id": order["id"]})
        return
    status = 70
    try:
        _become(order)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:  # noqa: BLE001 - the end of the child, whatever it was
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _become(order: dict[str, Any]) -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    null, log = (
        os.open(os.devnull, os.O_RDONLY),
        os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT),
    )
    for number, target in ((0, null), (1, log), (2, log)):
        os.dup2(target, number)
    Path("/proc/self/comm").write_text(f"chaos-{order['role']}")
    from django.conf import settings

    from tests.chaos import worker

    logging.config.dictConfig(settings.LOGGING)
    if order["role"] == "web":
        _serve()
    else:
        settings.FAILPOINTS = order["failpoints"]
        worker.run(order["name"], engine=order["engine"], pace=order["pace"])


def _serve() -> None:
    import uvicorn
    from django.conf import settings

    import mintweb.asgi

    config = uvicorn.Config(
        mintweb.asgi.application,
        host=settings.HOST,
        port=settings.PORT,
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
        lifespan="off",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
        log_level="warning",
        backlog=4096,
    )
    uvicorn.Server(config).run()


def _report_dead() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say({"dead": pid, "status": os.waitstatus_to_exitcode(status)})


def _say(content: dict[str, Any]) -> None:
    os.write(1, json.dumps(content).encode() + b"\n")


if __name__ == "__main__":
    main()
