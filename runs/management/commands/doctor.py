"""`manage.py doctor`: what is configured and whether each part answers, one line each, with what to do."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.files.storage import default_storage
from django.core.management.base import BaseCommand
from django.db import Error as DatabaseError

from mintweb import probes, programs
from runs.services import storage_mark

LOW_DISK_BYTES = 5 * 1024**3

# A check returns what it found, or raises NotAnswering with what to do.
Check = Callable[[], str]


class Command(BaseCommand):
    """Report on every part."""

    help = "Say what is configured and whether each part answers; the exit code is 1 when one does not."
    requires_system_checks = []

    def handle(self, *args: Any, **options: Any) -> None:
        """Print one line a part."""
        num_faults = 0
        for name, check in all_checks():
            try:
                self.stdout.write(f"ok    {name}: {check()}")
            except probes.NotAnswering as error:
                num_faults += 1
                self.stdout.write(f"FAIL  {name}: {error}")
        sys.exit(1 if num_faults else 0)


def all_checks() -> Iterator[tuple[str, Check]]:
    """Yield the name and the check of each part."""
    yield "data folder", data_folder
    yield "files", files
    yield "PostgreSQL", database
    yield "Redis", redis
    yield "device", device
    for name, directory in settings.BASE_MODELS.items():
        yield f"base model {name}", functools.partial(base_model, directory)
    yield "web and workers", ready


def data_folder() -> str:
    """Report the folder and its free space."""
    probes.check_data_folder()
    free_bytes = shutil.disk_usage(settings.DATA_DIR).free
    if free_bytes < LOW_DISK_BYTES:
        raise probes.NotAnswering(
            f"only {free_bytes / 1024**3:.1f} GiB are free for {settings.DATA_DIR}; free some space"
        )
    return f"{settings.DATA_DIR} ({free_bytes / 1024**3:.0f} GiB free)"


def files() -> str:
    """Report where checkpoints, payloads and datasets are kept."""
    try:
        default_storage.exists("doctor")
    except Exception as error:  # each storage has its own errors
        raise probes.NotAnswering(
            f"the storage does not answer ({error}); check MINTWEB_STORAGE_URL"
        ) from error
    with suppress(DatabaseError):  # the next check tells of that
        try:
            storage_mark.check()
        except OSError as error:
            raise probes.NotAnswering(error.strerror) from error
    return str(getattr(default_storage, "location", "") or "as MINTWEB_STORAGE_URL says")


def database() -> str:
    """Report the database server."""
    probes.check_database()
    return "embedded, answers" if settings.EMBEDDED_POSTGRES else "DATABASE_URL, answers"


def redis() -> str:
    """Report the message server."""
    probes.check_redis()
    return "embedded, answers" if settings.EMBEDDED_REDIS else "REDIS_URL, answers"


def device() -> str:
    """Report what the workers will compute on."""
    gpus = programs.visible_gpus()
    if settings.DEVICE.startswith("cuda") and not gpus:
        raise probes.NotAnswering(
            f"MINTWEB_DEVICE is {settings.DEVICE}, but no NVIDIA GPU is visible; install the driver or set cpu"
        )
    if importlib.util.find_spec("torch") is None:
        raise probes.NotAnswering("the package torch is missing: pip install -r requirements.txt")
    seen = f"GPUs {', '.join(gpus)}" if gpus else "no NVIDIA GPU"
    return f"{settings.DEVICE}, {settings.DTYPE} ({seen}, {len(programs.gpu_workers())} worker)"


def base_model(directory: str) -> str:
    """Report whether a base model is on this machine."""
    if "/" not in directory or not Path(directory).is_absolute():
        return "by name; it is downloaded on the first start"
    if not (Path(directory) / "config.json").exists():
        raise probes.NotAnswering(f"{directory} holds no config.json; correct MINTWEB_BASE_MODELS")
    return directory


def ready() -> str:
    """Report whether a running mintweb is ready."""
    try:
        probes.check_ready()
    except probes.NotAnswering as error:
        raise probes.NotAnswering(f"{error}; start it with make up or see {settings.LOG_DIR}") from error
    return f"ready at {probes.public_address()}"
