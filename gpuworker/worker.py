"""One GPU worker process put together: lease, engines, the three stages, and who may drive them.

Celery's `drain` task does the work. When none comes within a moment (Redis is down, a doorbell was
lost), the fallback thread does the same in its place.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from django.conf import settings

from gpuworker import boot, failpoints, scratch, vllm_servers
from gpuworker.busy import BusyMeter
from gpuworker.committer import Committer
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import BaseModelError
from gpuworker.growing import Growing
from gpuworker.intake import Intake
from gpuworker.leases import HUNG_S, Lease
from gpuworker.scheduler import Scheduler
from gpuworker.seats import Seat
from gpuworker.vllm_sampler import VllmSampler
from runs.models import Worker
from runs.services import claims, sample_claims, workers
from runs.threads import database_thread, until_reachable

logger = logging.getLogger(__name__)

IDLE_S: Final = 1.0
SLICE_S: Final = 20.0
_FALLBACK_GRACE_S: Final = 0.3


class GpuWorker:
    """Everything one worker process holds."""

    def __init__(self, *, load_engines: Callable[[Worker], Mapping[str, Engine]] = boot.load_engines) -> None:
        failpoints.arm(settings.FAILPOINTS)
        scratch.remove_left()
        self._busy = BusyMeter()
        self._stopping = threading.Event()
        self.row: Worker = until_reachable(_register)
        self._servers = Growing[VllmSampler]({})
        self._lease = Lease(
            self.row,
            busy_share=self._busy.share,
            is_stuck=self._is_stuck,
            on_lost=self._on_lost,
            on_stuck=_end_stuck_process,
            on_hung=_end_hung_process,
            samplers=lambda: {name: server.words for name, server in self._servers.items()},
        )
        self._engines = Growing(load_engines(self.row))
        self._committer = Committer(
            on_lost=lambda: self._intake.ready.set(),
            on_sample_end=lambda operation_pk: self._intake.end_sample(operation_pk),
        )
        self._intake = Intake(
            self.row,
            self._engines,
            unwritten=lambda: self._committer.unwritten,
            may_judge=lambda: self._lease.is_steady,
        )
        self._prepare(self._engines)
        self.scheduler = Scheduler(
            self._engines,
            self._intake,
            self._committer,
            release=self._release,
            busy=self._busy,
            servers=self._servers,
        )
        self._fallback = database_thread("fallback", self._drive_without_celery)
        self._loading = database_thread("loading", self._load_absent)

    def start(self) -> None:
        """Begin to take work for the base models that are loaded; those to be downloaded come later."""
        self._intake.start()
        self._announce()
        self._fallback.start()
        self._loading.start()

    def drain_slice(self) -> None:
        """Work until idle for a second or for one slice."""
        self.scheduler.drain(idle_s=IDLE_S, slice_s=SLICE_S)

    def give_up(self, run_pk: int) -> None:
        """Throw a run's in-memory state away; it is claimed again and rebuilt from the log."""
        seat = self._intake.seats.get(run_pk)
        if seat is not None:
            seat.is_lost = True
            self._intake.ready.set()

    def stop(self) -> None:
        """End at the next operation boundary, with every run's state kept and set free."""
        self._stopping.set()
        self._intake.stop()
        self.scheduler.stop()
        self._committer.stop()
        for server in self._servers.values():
            server.stop()
        sample_claims.release_samples(self.row)
        workers.stop(self.row)
        self._lease.stop()
        self._fallback.join()
        boot.end_group()

    def _drive_without_celery(self) -> None:
        while not self._stopping.is_set():
            self._intake.ready.wait(IDLE_S)
            self._stopping.wait(_FALLBACK_GRACE_S)
            if self.scheduler.has_work and not self.scheduler.is_draining:
                self.drain_slice()
            else:
                self.scheduler.tidy()

    def _announce(self) -> None:
        """Count among the workers that serve what is loaded."""
        row = self.row
        describe = partial(
            workers.describe, row, device=row.device, dtype=row.dtype, memory_bytes=row.memory_bytes
        )
        until_reachable(partial(describe, fingerprints=row.fingerprint))

    def _load_absent(self) -> None:
        """Load the other base models, each as soon as it is here. What computes waits for the loading alone."""
        for name in boot.absent():
            try:
                folder = boot.resolve(str(settings.BASE_MODELS[name]))
            except BaseModelError as error:
                boot.refuse(self.row, name, error)
                continue
            with self.scheduler.paused():
                if self._stopping.is_set():
                    return
                engines = boot.load(self.row, name, folder)
                if self._stopping.is_set():
                    return
                self._prepare(engines)
                self._engines.add(engines)
            self._announce()
            self._intake.wake()

    def _prepare(self, engines: Mapping[str, Engine]) -> None:
        for engine in engines.values():
            engine.watch(self._busy.beat)
        self._servers.add(vllm_servers.connect(engines, self._committer, on_ended=self._intake.ready.set))

    def _release(self, seat: Seat) -> None:
        is_lost = seat.is_lost or seat.is_suspect
        claims.release_run(seat.run.pk, self.row, fence=seat.run.fence, is_lost=is_lost)

    def _is_stuck(self) -> bool:
        """Say whether the device is, and not only what waits until the database takes results again."""
        return self._busy.stuck_s() > settings.HANG_S and self._lease.heard_s > settings.HANG_S

    def _on_lost(self) -> None:
        """Give up everything: other workers own the runs by now."""
        if self._stopping.is_set():
            return
        for run_pk in list(self._intake.seats):
            self.give_up(run_pk)
        logger.error("this worker was declared dead; the process ends so that a fresh one starts")
        threading.Thread(target=_end_process, daemon=True).start()


def _register() -> Worker:
    workers.bury_dead()
    return workers.register(device=settings.DEVICE, dtype=settings.DTYPE)


def _end_stuck_process() -> None:
    """End at once: the thread that computes cannot be asked to."""
    logger.critical(
        "nothing was computed for %s s; the process ends so that a fresh one starts", settings.HANG_S
    )
    _end_process()


def _end_hung_process() -> None:
    """End at once: what waits for the database waits for ever."""
    logger.critical(
        "the database took no renewal of the lease for %s s; the process ends so that a fresh one starts",
        HUNG_S,
    )
    _end_process()


def _end_process() -> None:
    os._exit(3)
