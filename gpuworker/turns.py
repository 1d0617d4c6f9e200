"""Which operations go through the engine together: of each run one at a time, until the budget is full.

Operations that failed together go one by one when they come again, so that only the guilty one fails. Used by the
scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gpuworker.engine.types import ForwardBackward, OptimStep
from gpuworker.handlers import Turn
from gpuworker.seats import PreparedOperation, Seat

CYCLE_TOKENS: Final = 16_384


class Turns:
    """Chooses from the heads of the seats' queues."""

    def __init__(self) -> None:
        self._lone: set[int] = set()

    def forward_backwards(self, seats: Sequence[Seat]) -> list[Turn]:
        """Return the leading forward_backwards, one of each run at a time until the budget is full.

        Who waited longest comes first: a budget that a few runs fill goes round.
        """
        turns: list[Turn] = []
        ahead = {seat.run.pk: 0 for seat in seats}
        num_tokens = 0
        open_seats = sorted(seats, key=lambda seat: seat.last_used_at)
        while open_seats:
            for seat in list(open_seats):
                position = ahead[seat.run.pk]
                operation = seat.queue[position] if position < len(seat.queue) else None
                is_full = turns and operation and num_tokens + operation.num_tokens > CYCLE_TOKENS
                if operation is None or not self._joins(operation, ForwardBackward) or is_full:
                    open_seats.remove(seat)
                    continue
                turns.append(Turn(seat, operation))
                num_tokens += operation.num_tokens
                ahead[seat.run.pk] += 1
        return turns

    def optim_steps(self, seats: Sequence[Seat]) -> list[Turn]:
        """Return the optimizer steps that are next; those on an adapter in doubt wait until it has been rebuilt."""
        trusted = [seat for seat in seats if not seat.is_suspect]
        return [
            Turn(seat, seat.head)
            for seat in trusted
            if seat.head is not None and self._joins(seat.head, OptimStep)
        ]

    def part(self, turns: Sequence[Turn]) -> None:
        """Have operations that failed together go one by one from now on."""
        self._lone |= {turn.operation.taken.pk for turn in turns if turn.operation.taken is not None}

    def pop_lone(self, seats: Sequence[Seat]) -> Seat | None:
        """Return a seat whose next operation is to go by itself, once."""
        for seat in sorted(seats, key=lambda seat: seat.last_used_at):
            if seat.head is not None and seat.head.taken is not None and seat.head.taken.pk in self._lone:
                self._lone.discard(seat.head.taken.pk)
                return seat
        return None

    def _joins(self, operation: PreparedOperation, kind: type[ForwardBackward | OptimStep]) -> bool:
        """Say whether an operation goes through the engine together with others of its kind."""
        is_lone = operation.taken is not None and operation.taken.pk in self._lone
        return isinstance(operation.request, kind) and not (operation.is_suspicious or is_lone)
