"""Which operations may have ended the workers that took them, and when one is given up.

One that several workers took in vain is tried with nothing beside it, so that it takes nobody along and nobody takes
it along; one that ended its worker even so fails.
"""

from __future__ import annotations

from typing import Final, Protocol

from gpuworker.engine.exceptions import EngineError
from runs.services.claims import LONE_ATTEMPTS

# Workers that took an operation in vain before it is tried alone.
ATTEMPTS_TOGETHER: Final = 2


class Taken(Protocol):
    """An operation with the workers that took it, this one among them, and those that had tried it alone."""

    @property
    def attempts(self) -> int:
        """Workers that took it."""

    @property
    def lone_attempts(self) -> int:
        """Workers that began it with nothing beside it."""


def is_suspicious(taken: Taken) -> bool:
    """Whether workers died that had taken it, so that nothing may share its fate."""
    return taken.attempts > ATTEMPTS_TOGETHER


def is_poison(taken: Taken) -> bool:
    """Whether it ended every worker that tried it alone."""
    return taken.lone_attempts >= LONE_ATTEMPTS


def given_up(taken: Taken) -> EngineError:
    """Return the error of one that is poison."""
    return EngineError(f"given up: it ended its worker {taken.lone_attempts} times")
