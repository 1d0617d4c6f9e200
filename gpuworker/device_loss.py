"""A device whose context is gone for this process: nothing can be computed any more, whichever operation met it.

The process ends before anything of that is committed: the operations did no wrong, and a fresh one does them again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from gpuworker.engine.memory import is_device_lost

logger = logging.getLogger(__name__)


def end_if_lost(error: Exception) -> None:
    """End the process at once if the error says that its device is lost."""
    if is_device_lost(error):
        logger.critical(
            "the device is lost; the process ends so that a fresh one starts: %s", error, exc_info=error
        )
        os._exit(3)


@contextmanager
def noticed() -> Iterator[None]:
    """End the process if what is inside fails because its device is lost."""
    try:
        yield
    except RuntimeError as error:
        end_if_lost(error)
        raise
