"""Load the configured base models, one engine each; one that cannot be loaded is reported, not fatal."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from django.conf import settings

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import BaseModelError
from gpuworker.engine.residency import AdapterMemory
from gpuworker.fingerprints import fingerprint_of
from runs.models import Worker
from runs.services import base_models, workers
from runs.services.base_models import BaseModelInfo, ModelSizes

logger = logging.getLogger(__name__)

# Below this a second thread costs more than it saves: 16 tokens through the shipped model take 23 ms of the
# SDK's time with one thread and 36 with two, beside the web server and the database on two cores.
MULTI_THREAD_HIDDEN_SIZE: Final = 512
_MIB: Final = 1 << 20


def load_engines(worker: Worker) -> dict[str, Engine]:
    """Return an engine for each base model of the settings that could be loaded."""
    engines: dict[str, Engine] = {}
    torch.set_num_threads(settings.THREADS or _num_threads(map(str, settings.BASE_MODELS.values())))
    for name, directory in settings.BASE_MODELS.items():
        started_at = time.monotonic()
        try:
            engine = Engine.load(
                resolve(str(directory)),
                device=settings.DEVICE,
                dtype=settings.DTYPE,
                adapter_memory=_adapter_memory(),
            )
        except BaseModelError as error:
            logger.error("base model %s could not be loaded: %s", name, error)  # noqa: TRY400 - one sentence is enough
            base_models.report(worker, BaseModelInfo(name=name, directory=str(directory), error=str(error)))
            continue
        engines[name] = engine
        base_models.report(worker, _info(name, str(directory), engine))
        workers.describe(
            worker,
            device=engine.fingerprint["device"],
            dtype=engine.fingerprint["dtype"],
            memory_bytes=engine.memory_bytes,
            fingerprints={loaded: fingerprint_of(one) for loaded, one in engines.items()},
        )
        logger.info("base model %s is ready after %.1f s", name, time.monotonic() - started_at)
    return engines


def resolve(directory_or_name: str) -> Path:
    """Return the local folder of a base model, from the hub's cache when it is given by name.

    Raises:
        BaseModelError: there is no such folder and the hub cannot give one.
    """
    if Path(directory_or_name).is_dir():
        return Path(directory_or_name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
        return Path(snapshot_download(directory_or_name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        raise BaseModelError(
            f"{directory_or_name!r} is no folder here and could not be downloaded: {str(error).splitlines()[0]}"
        ) from error


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
