"""How runs leave this worker: each with its state kept, and with its seat last. Used by the compute stage alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gpuworker.committer import Committer
from gpuworker.intake import Intake
from gpuworker.residents import Residents
from gpuworker.seats import Seat
from runs.threads import until_reachable


class Departures:
    """Sets runs free.

    Args:
        release: enters that a seat's run is free.
    """

    def __init__(
        self, residents: Residents, committer: Committer, intake: Intake, *, release: Callable[[Seat], None]
    ) -> None:
        self._residents = residents
        self._committer = committer
        self._intake = intake
        self._release = release
        self.are_engines_lent = False
        """Whether somebody else uses the engines, so that runs leave with what was kept before."""

    def let_go(self, seat: Seat) -> None:
        """Set a run free with its state kept."""
        self.keep(seat)
        self._committer.flush()
        self.forget(seat)

    def keep(self, seat: Seat) -> None:
        """Begin to write a run's state, unless nobody can go on from it."""
        is_there = seat.is_restored or seat.is_shelved
        if is_there and not (self.are_engines_lent or seat.is_lost or seat.is_suspect):
            self._residents.snapshot(seat)

    def forget(self, seat: Seat) -> None:
        """Set a run free. The seat goes last: until then intake does not claim the run again."""
        if not self.are_engines_lent:
            seat.engine.drop_adapter(seat.adapter_id)
        until_reachable(partial(self._release, seat))
        self._intake.drop(seat)
