"""How sampling and training share one device; knows seconds only. The scheduler asks it between cycles and steps.

While both have work each gets half of the time. Neither a cycle nor a decode step is interrupted, so what
one took too much is made up before its next turn; what one did not need is not saved up.
"""

from __future__ import annotations


class DeviceShare:
    """The account of one device."""

    def __init__(self) -> None:
        self._owed_to_sampling_s = 0.0

    @property
    def is_samplings_turn(self) -> bool:
        """Whether training has had more than its half."""
        return self._owed_to_sampling_s > 0

    def note_cycle(self, seconds: float) -> None:
        """Count a training cycle."""
        self._owed_to_sampling_s += seconds

    def note_step(self, seconds: float) -> None:
        """Count a decode step."""
        self._owed_to_sampling_s -= seconds

    def settle(self) -> None:
        """Forget what is owed: one side has nothing to do."""
        self._owed_to_sampling_s = 0.0
