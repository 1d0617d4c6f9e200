"""The vLLM servers of the settings, each connected to the base model whose samples it draws."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from django.conf import settings

from gpuworker import scratch, snapshots
from gpuworker.committer import Committer
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import EngineError
from gpuworker.vllm_adapters import Folders
from gpuworker.vllm_client import served_model
from gpuworker.vllm_sampler import VllmSampler

logger = logging.getLogger(__name__)

LOOK_S: Final = 5.0
# A server may be silent for so long to what it answers at once, and gets a second try.
SILENCE_S: Final = 10.0
_WRITTEN_S: Final = 0.01


def connect(
    engines: Mapping[str, Engine], committer: Committer, *, on_ended: Callable[[], None]
) -> dict[str, VllmSampler]:
    """Return who draws the samples of each base model that is loaded here and has a server; none waits for its server.

    Args:
        on_ended: called from other threads when some sample has ended.
    """
    servers = {}
    for name, url in settings.VLLM.items():
        if name not in engines:
            continue
        try:
            model = served_model(name, str(settings.BASE_MODELS[name]), engines[name])
        except EngineError as error:
            logger.error("no vLLM server is asked for samples of %s: %s", name, error)  # noqa: TRY400 - one sentence is enough
            continue
        servers[name] = VllmSampler(
            url,
            model,
            _folders(committer),
            on_ended=on_ended,
            api_key=settings.VLLM_API_KEY,
            look_s=LOOK_S,
            silence_s=SILENCE_S,
        )
    return servers


def _folders(committer: Committer) -> Folders:
    """Lend the folders of checkpoints where they are; those of a bucket are copied for as long as they are lent."""
    copies = Path(tempfile.mkdtemp(prefix=scratch.prefix()))  # only its owner can enter
    atexit.register(shutil.rmtree, copies, ignore_errors=True)

    def lend(directory: str) -> Path:
        while directory in committer.unwritten:  # it is answered already, and being written
            time.sleep(_WRITTEN_S)
        return snapshots.local_folder(directory, copies)

    def take_back(directory: str) -> None:
        shutil.rmtree(copies / directory, ignore_errors=True)

    return Folders(lend=lend, take_back=take_back)
