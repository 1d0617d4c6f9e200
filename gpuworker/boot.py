"""Load the configured base models, one engine each; one that cannot be loaded is reported, not fatal."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from django.conf import settings

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import BaseModelError
from runs.models import Worker
from runs.services import base_models
from runs.services.base_models import BaseModelInfo

logger = logging.getLogger(__name__)


def load_engines(worker: Worker) -> dict[str, Engine]:
    """Return an engine for each base model of the settings that could be loaded."""
    engines: dict[str, Engine] = {}
    for name, directory in settings.BASE_MODELS.items():
        started_at = time.monotonic()
        try:
            engine = Engine.load(resolve(str(directory)), device=settings.DEVICE, dtype=settings.DTYPE)
        except BaseModelError as error:
            logger.error("base model %s could not be loaded: %s", name, error)  # noqa: TRY400 - one sentence is enough
            base_models.report(worker, BaseModelInfo(name=name, directory=str(directory), error=str(error)))
            continue
        engines[name] = engine
        base_models.report(worker, _info(name, str(directory), engine))
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


def _info(name: str, directory: str, engine: Engine) -> BaseModelInfo:
    return BaseModelInfo(
        name=name,
        directory=directory,
        vocab_size=engine.vocab_size,
        max_context=engine.max_context,
        max_rank=engine.max_rank,
        num_parameters=engine.num_parameters,
        architecture=engine.architecture,
    )
