"""What the compute stage hands to the committer, and the queue between the two."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.memory import available_bytes
from gpuworker.engine.types import SampleResult
from gpuworker.handlers import Outcome
from gpuworker.seats import Seat
from runs.services.commits import Result

# Items that may wait, samples not counted: of those no more are open than are drawn at a time.
MAX_WAITING: Final = 8
_MAX_TOGETHER: Final = 64
# Host copies of states that wait to be written may take so much together, and no more than a part of what is free.
_MAX_STATE_BYTES: Final = 1 << 30
_STATE_PART: Final = 8


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What one cycle did to one seat, or a part of it; an early part is a save to be answered before its file is written."""

    seat: Seat
    from_seq: int
    outcomes: Sequence[Outcome]
    is_last: bool = True
    is_early: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleOutcome:
    """The answer of one sample request, or its error."""

    operation_pk: int
    answer: SampleResult | Result
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class SnapshotOutcome:
    """A seat's state to be kept for replay, and the seconds that copying it took."""

    seat: Seat
    seq: int
    state: AdapterState
    copy_s: float


Item = Sequence[RunOutcome] | SampleOutcome | SnapshotOutcome


def saved_bytes(outcomes: Iterable[Outcome]) -> int:
    """Return what the states take that are to be written with these outcomes."""
    return sum(one.checkpoint.state.num_bytes for one in outcomes if one.checkpoint is not None)


@dataclass(frozen=True)
class SamplesTaken:
    """Samples that waited one behind the other, to be stored together."""

    samples: Sequence[SampleOutcome]


class OutcomeQueue:
    """First in, first out, between one thread that puts and one that takes.

    Args:
        state_bytes: memory of the states that wait to be written; a single item may exceed it.
    """

    def __init__(self, state_bytes: int | None = None) -> None:
        self.state_bytes = _default_state_bytes() if state_bytes is None else state_bytes
        self._held_bytes = self._taken_bytes = 0
        self._is_taken = self._is_closed = False
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()

    def put(self, item: Item) -> None:
        """Append an item; blocks while too many wait, or too large ones."""
        num_bytes = _state_bytes(item)
        with self._changed:
            self._changed.wait_for(lambda: isinstance(item, SampleOutcome) or self._has_room(num_bytes))
            self._held_bytes += num_bytes
            self._items.append(item)
            self._changed.notify_all()

    def take(self) -> Sequence[RunOutcome] | SnapshotOutcome | SamplesTaken | None:
        """Return what waits longest, samples with those right behind; None once nothing comes any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_closed)
            if not self._items:
                return None
            self._is_taken = True
            item = self._items.popleft()
            self._taken_bytes = _state_bytes(item)
            return SamplesTaken(self._with_following(item)) if isinstance(item, SampleOutcome) else item

    def end_taken(self) -> None:
        """Say that what was taken is dealt with."""
        with self._changed:
            self._held_bytes -= self._taken_bytes
            self._is_taken = False
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything put is dealt with."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._items or self._is_taken))

    def close(self) -> None:
        """Say that nothing more comes."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        if sum(not isinstance(item, SampleOutcome) for item in self._items) >= MAX_WAITING:
            return False
        return not (self._held_bytes and num_bytes) or self._held_bytes + num_bytes <= self.state_bytes

    def _with_following(self, sample: SampleOutcome) -> list[SampleOutcome]:
        samples = [sample]
        while self._items and len(samples) < _MAX_TOGETHER:
            following = self._items[0]
            if not isinstance(following, SampleOutcome):
                break
            samples.append(following)
            self._items.popleft()
        return samples


def _default_state_bytes() -> int:
    return min(_MAX_STATE_BYTES, available_bytes() // _STATE_PART)


def _state_bytes(item: Item) -> int:
    """Return what an item holds in copies of adapters."""
    if isinstance(item, SnapshotOutcome):
        return item.state.num_bytes
    return 0 if isinstance(item, SampleOutcome) else sum(saved_bytes(run.outcomes) for run in item)
