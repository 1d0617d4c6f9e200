"""The three processes of one pass, born by fork from a parent that has imported everything: web, worker, client."""

from __future__ import annotations

import ctypes
import faulthandler
import logging.config
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.chaos.sweep_calls import Calls, Fault

API_KEY: Final = "tml-sweep-sweep-sweep"
INLINE_BYTES: Final = 1000  # larger payloads go into files
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one pass happens: a folder with the storage and the processes' notes, a database, a port."""

    folder: Path
    database: str
    port: int

    @property
    def storage(self) -> Path:
        """What the product stores."""
        return self.folder / "storage"

    def log(self, role: str) -> Path:
        """What a process prints."""
        return self.folder / f"{role}.log"

    def calls(self, role: str) -> Path:
        """The list of calls that a process made, kept when it ends well."""
        return self.folder / f"{role}.calls"

    @property
    def blown(self) -> Path:
        """Tells which call was broken, from then on."""
        return self.folder / "blown"

    @property
    def notes(self) -> Path:
        """What the client knows at its end."""
        return self.folder / "notes"

    @property
    def halfway(self) -> Path:
        """The client waits in the middle."""
        return self.folder / "halfway"

    @property
    def go_on(self) -> Path:
        """The client may go on."""
        return self.folder / "go-on"


def enter(place: Place) -> None:
    """Let this process work on the place's database and storage from now on; nothing is open yet."""
    from django.conf import settings
    from django.db import connections

    connections.settings["default"]["NAME"] = place.database
    settings.STORAGES["default"]["OPTIONS"]["location"] = str(place.storage)
    settings.INLINE_PAYLOAD_BYTES = INLINE_BYTES
    set_pace()


def set_pace() -> None:
    """Shorten what would only make a pass longer; safety must not depend on any of it."""
    from gpuworker import intake, scheduler, worker
    from runs import threads
    from runs.services import workers

    workers.LEASE_S, workers.HEARTBEAT_S, workers.LOCK_GRACE_S = 2, 0.25, 0.5  # type: ignore[misc, assignment]
    intake.SWEEP_S = 0.25  # type: ignore[misc]
    worker.IDLE_S = 0.2  # type: ignore[misc]
    scheduler.REPLAY_BUDGET_S = 0.003  # type: ignore[misc]
    threads._RETRY_S = 0.05  # type: ignore[misc]


def bear(role: str, place: Place, fault: Fault | None) -> int:
    """Start a web server, a worker or the client; returns its process number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        _become(role, place, fault if fault is not None and fault.role == role else None)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:  # noqa: BLE001 - the end of the child, whatever it was
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _become(role: str, place: Place, fault: Fault | None) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(place.log(role), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in (1, 2):
        os.dup2(log, number)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    if role == "client":
        _ask(place)
        return
    from django.conf import settings

    logging.config.dictConfig(settings.LOGGING)
    calls = Calls(storage=place.storage, fault=fault, blown=place.blown)
    calls.watch()
    {"web": _serve, "worker": _compute}[role](place)
    calls.write(place.calls(role))


def _ask(place: Place) -> None:
    from tests.chaos import sweep_script

    client = sweep_script.Scripted(place.port, API_KEY)
    client.work(lambda: _rest(place))
    sweep_script.write(client.notes, place.notes)


def _rest(place: Place) -> None:
    place.halfway.touch()
    _until(place.go_on.exists)


def _until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)


def _serve(place: Place) -> None:
    import uvicorn

    import mintweb.asgi

    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it anew once it has ended
    config = uvicorn.Config(
        mintweb.asgi.application,
        host="127.0.0.1",
        port=place.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        timeout_graceful_shutdown=3,
        log_level="warning",
    )
    uvicorn.Server(config).run()


def _compute(place: Place) -> None:
    """Do what Celery does: ring the worker again and again, and end it when asked to."""
    from gpuworker import tasks
    from gpuworker.worker import GpuWorker
    from tests.chaos import engine

    is_ending = threading.Event()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def end() -> None:
        signal.sigwait([signal.SIGTERM])
        is_ending.set()
        tasks.begin_to_stop()

    threading.Thread(target=end, daemon=True).start()
    tasks.begin(lambda: GpuWorker(load_engines=engine.load_engines))
    while not is_ending.is_set():
        tasks.drain.apply()
    tasks.stop()
