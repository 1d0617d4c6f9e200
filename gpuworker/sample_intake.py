"""Which sample requests are in the worker: about as many as its engines draw at a time, and as many again.

Used by intake, which takes them; compute and the committer say what became of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Final

from gpuworker import payloads
from gpuworker.engine.engine import Engine
from gpuworker.seats import PutOff
from gpuworker.snapshots import StorageError
from runs.models import Worker
from runs.services import sample_claims
from runs.services.sample_claims import TakenSample

logger = logging.getLogger(__name__)

# Requests held for each that can be drawn at a time: more would stand before those of people who come later.
HELD_PER_SLOT: Final = 2
_AT_A_TIME: Final = 64


class SampleIntake:
    """Takes requests with their payloads.

    One whose payload or weights cannot be read just now goes back to where any worker finds it, this one after a while.
    """

    def __init__(
        self, worker: Worker, engines: Mapping[str, Engine], *, unwritten: Callable[[], Collection[str]]
    ) -> None:
        self._worker = worker
        self._engines = engines
        self._unwritten = unwritten
        self._lock = threading.Lock()
        self._taken: list[TakenSample] = []
        self._held: dict[int, int] = {}  # whose they are
        self._unread: dict[int, PutOff] = {}
        self._to_give_back: set[int] = set()
        self._may_be_more = False

    @property
    def num_waiting(self) -> int:
        """Return how many were taken since the last `pop`."""
        return len(self._taken)

    @property
    def num_unread(self) -> int:
        """Return how many cannot be read just now."""
        return len(self._unread)

    def take(self) -> bool:
        """Take what there is room for; return whether something came."""
        with self._lock:
            held = dict(self._held)
            unread = dict(self._unread)
        limit = min(_AT_A_TIME, self._most - len(held))
        if limit <= 0:
            self._may_be_more = True
            return False
        found = sample_claims.take_samples(
            self._worker,
            list(self._engines),
            limit=limit,
            held=[*held, *(pk for pk, put_off in unread.items() if not put_off.is_due)],
            held_owners=held.values(),
            unwritten=self._unwritten(),
        )
        self._may_be_more = len(found) == limit
        if not self._may_be_more:  # what was due and was not found is gone
            self._forget_unread(
                {pk for pk, one in unread.items() if one.is_due} - {sample.pk for sample in found}
            )
        readable = self._read(found)
        with self._lock:
            self._taken += readable
            self._held |= {sample.pk: sample.owner_pk for sample in readable}
            self._to_give_back -= self._held.keys()
        return bool(readable)

    def pop(self) -> list[TakenSample]:
        """Return the requests taken since the last call."""
        with self._lock:
            taken, self._taken = self._taken, []
        return taken

    def put_off(self, operation_pk: int) -> None:
        """Let a request go whose payload or weights cannot be read just now; it is given back by `give_back`."""
        with self._lock:
            self._held.pop(operation_pk, None)
            self._unread.setdefault(operation_pk, PutOff()).again()
            self._to_give_back.add(operation_pk)

    def give_back(self) -> None:
        """Set requests free that this worker has taken and does not hold."""
        with self._lock:
            pks = set(self._to_give_back)
        if pks:
            sample_claims.release_samples(self._worker, only=pks)
            with self._lock:
                self._to_give_back -= pks

    def end(self, operation_pk: int) -> bool:
        """Note that a request has its answer, or is to be taken again; return whether to look for more."""
        with self._lock:
            self._held.pop(operation_pk, None)
            self._unread.pop(operation_pk, None)
            return self._may_be_more and len(self._held) <= self._most * 3 // 4

    @property
    def _most(self) -> int:
        return HELD_PER_SLOT * sum(engine.num_slots for engine in self._engines.values())

    def _read(self, found: Collection[TakenSample]) -> list[TakenSample]:
        """Return the requests with their payloads. After one that cannot be read those in storage are left for next time.

        Each such read takes a while, and all runs wait for it.
        """
        readable = []
        is_away = False
        for sample in found:
            if is_away and sample.payload_file:
                with self._lock:
                    self._to_give_back.add(sample.pk)
                continue
            try:
                readable.append(payloads.fetched(sample, f"sample {sample.pk}"))
            except FileNotFoundError:
                readable.append(sample)  # it fails when it is begun
            except StorageError as error:
                logger.warning("trying again later: %s", error)
                is_away = True
                self.put_off(sample.pk)
        return readable

    def _forget_unread(self, pks: Collection[int]) -> None:
        with self._lock:
            for pk in pks:
                self._unread.pop(pk, None)
