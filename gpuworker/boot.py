"""Load the configured base models, one engine each; one that cannot be loaded is reported, not fatal."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final, cast

import torch
from django.conf import settings

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import BaseModelError
from gpuworker.engine.memory import is_device_lost, is_out_of_memory
from gpuworker.engine.residency import AdapterMemory
from gpuworker.fingerprints import fingerprint_of
from gpuworker.group import WorkerGroup
from runs.models import Worker
from runs.services import base_models
from runs.services.base_models import BaseModelInfo, ModelSizes
from runs.threads import until_reachable

logger = logging.getLogger(__name__)

# Below this a second thread costs more than it saves: 16 tokens through the shipped model take 23 ms of the
# SDK's time with one thread and 36 with two, beside the web server and the database on two cores.
MULTI_THREAD_HIDDEN_SIZE: Final = 512
# It fits anywhere, and has fewer heads than there may be devices.
_NEVER_SPLIT: Final = "mintweb/tiny"
_MIB: Final = 1 << 20

_group: WorkerGroup | None = None


def load_engines(worker: Worker) -> dict[str, Engine]:
    """Return an engine for each base model that is in a folder here and could be loaded; `absent` are the others.

    With MINTWEB_TENSOR_PARALLEL this starts the processes that hold parts of them; `end_group` ends those.
    """
    global _group
    torch.set_num_threads(settings.THREADS or _num_threads(map(str, settings.BASE_MODELS.values())))
    if settings.TENSOR_PARALLEL > 1:
        _group = WorkerGroup(_devices(), timeout_s=settings.HANG_S, on_lost=_end_process)
    engines: dict[str, Engine] = {}
    for name, directory in settings.BASE_MODELS.items():
        if Path(directory).is_dir():
            engines |= load(worker, name, Path(directory))
    return engines


def absent() -> list[str]:
    """Return the base models of the settings that the hub is to be asked for, which may take minutes."""
    return [name for name, directory in settings.BASE_MODELS.items() if not Path(directory).is_dir()]


def load(worker: Worker, name: str, folder: Path) -> dict[str, Engine]:
    """Return the engine of a base model by its name, nothing if the folder cannot be loaded, and report which.

    The worker's row in memory takes in what it computes with; others see that once it serves the base model.
    """
    started_at = time.monotonic()
    try:
        engine = _load(name, folder)
    except BaseModelError as error:
        refuse(worker, name, error)
        engine = None
    if engine is None:
        torch.cuda.empty_cache()  # its weights went with the error; does nothing without a GPU
        return {}
    until_reachable(partial(base_models.report, worker, _info(name, str(settings.BASE_MODELS[name]), engine)))
    worker.device, worker.dtype = _device_words(engine), engine.fingerprint["dtype"]
    worker.memory_bytes = engine.memory_bytes
    worker.fingerprint = {**worker.fingerprint, name: fingerprint_of(engine)}
    logger.info("base model %s is ready after %.1f s", name, time.monotonic() - started_at)
    return {name: engine}


def refuse(worker: Worker, name: str, error: BaseModelError) -> None:
    """Report that a base model is not to be had."""
    logger.error("base model %s could not be loaded: %s", name, error)
    info = BaseModelInfo(name=name, directory=str(settings.BASE_MODELS[name]), error=str(error))
    until_reachable(partial(base_models.report, worker, info))


def end_group() -> None:
    """End the processes that hold parts of this worker's base models, where there are any."""
    global _group
    group, _group = _group, None
    if group is not None:
        group.close()


def resolve(directory_or_name: str) -> Path:
    """Return the local folder of a base model, from the hub's cache when it is given by name.

    Raises:
        BaseModelError: there is no such folder and the hub cannot give one.
    """
    if Path(directory_or_name).is_dir():
        return Path(directory_or_name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # Of the HTTP library that the hub's client uses: a connection that breaks off, for one.
    http_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
        return Path(snapshot_download(directory_or_name, allow_patterns=patterns))
    except (http_error, OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BaseModelError(
            f"{directory_or_name!r} is no folder here and could not be downloaded: {reason}"
        ) from error


def _load(name: str, directory: Path) -> Engine:
    """Load a base model, by itself or over the group.

    Whatever keeps one from loading by itself is its own matter: the worker serves the others. Processes of a group
    would go on out of step.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    memory = _adapter_memory()
    if _group is not None and name != _NEVER_SPLIT:
        return _group.load(directory.resolve(), dtype=settings.DTYPE, adapter_memory=memory)
    try:
        return Engine.load(directory, device=settings.DEVICE, dtype=settings.DTYPE, adapter_memory=memory)
    except BaseModelError:
        raise
    except Exception as error:
        if is_device_lost(error):
            raise
        logger.exception("base model %s could not be loaded", name)
        what = "it does not fit into memory" if is_out_of_memory(error) else type(error).__name__
        raise BaseModelError(f"{what}: {next(iter(str(error).splitlines()), '')}") from error


def _devices() -> list[str]:
    """Return the device of each process of the group, this one first."""
    size = settings.TENSOR_PARALLEL
    if settings.DEVICES:
        return list(settings.DEVICES[:size])
    return ["cpu" if settings.DEVICE == "cpu" else f"cuda:{index}" for index in range(size)]


def _device_words(engine: Engine) -> str:
    if _group is None:
        return engine.fingerprint["device"]
    first, *_, last = _devices()
    return f"{settings.TENSOR_PARALLEL} devices: {first if first == last else f'{first} to {last}'}"


def _end_process(reason: str) -> None:
    """End at once: this thread or another may be waiting for a process that is gone."""
    logger.critical("%s; the process ends so that a fresh group starts", reason)
    os._exit(3)


def _adapter_memory() -> AdapterMemory:
    num_engines = max(1, len(settings.BASE_MODELS) - 1)  # the adapters of the shipped model hardly count
    return AdapterMemory(
        device_bytes=settings.ADAPTER_MEMORY_MB * _MIB // num_engines,
        host_bytes=settings.ADAPTER_HOST_MEMORY_MB * _MIB // num_engines,
        num_engines=num_engines,
        num_workers=settings.NUM_LOCAL_WORKERS,
    )


def _num_threads(directories: Iterable[str]) -> int:
    """Return how many threads the largest model is worth; fixed for the life of the process, as results may depend on it."""
    hidden_sizes = [_hidden_size(Path(directory) / "config.json") for directory in directories]
    return 1 if max(hidden_sizes) < MULTI_THREAD_HIDDEN_SIZE else torch.get_num_threads()


def _hidden_size(config: Path) -> int:
    """Return a model's hidden size; one that is not on this disk yet counts as large."""
    try:
        return int(json.loads(config.read_text())["hidden_size"])
    except FileNotFoundError:
        return MULTI_THREAD_HIDDEN_SIZE
    except (KeyError, TypeError, ValueError):
        return 0


def _info(name: str, directory: str, engine: Engine) -> BaseModelInfo:
    return BaseModelInfo(
        name=name,
        directory=directory,
        vocab_size=engine.vocab_size,
        max_context=engine.max_context,
        max_rank=engine.max_rank,
        num_parameters=engine.num_parameters,
        architecture=engine.architecture,
        precision=engine.precision,
        sizes=ModelSizes(**engine.sizes),
    )
