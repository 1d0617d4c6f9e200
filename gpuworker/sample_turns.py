"""Sample requests that wait in the worker: those of an owner in order, and the owners in turn."""

from __future__ import annotations

from collections import OrderedDict, deque

from runs.services.sample_claims import TakenSample


class SampleTurns:
    """The requests on one base model; who has had a turn comes after all others."""

    def __init__(self) -> None:
        self._of_owners: OrderedDict[int, deque[TakenSample]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._of_owners)

    @property
    def head(self) -> TakenSample:
        """The request whose turn it is."""
        return next(iter(self._of_owners.values()))[0]

    def put(self, taken: TakenSample) -> None:
        """Let a request wait for its turn."""
        self._of_owners.setdefault(taken.owner_pk, deque()).append(taken)

    def pop(self) -> TakenSample:
        """Return the request whose turn it is, and end the turn."""
        owner_pk, own = self._of_owners.popitem(last=False)
        taken = own.popleft()
        if own:
            self._of_owners[owner_pk] = own
        return taken
