"""Payload files that no operation names any more."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from itertools import chain, islice, takewhile
from typing import Final

from django.db import transaction

from runs.models import Operation
from runs.services import blobs

_BATCH: Final = 100
_NUM_PREFIXES: Final = 256
_PREFIXES_AT_ONCE: Final = 8
_TURN_S: Final = 60


def delete_unused(names: Iterable[str]) -> int:
    """Delete those of the files that no operation names; what was stored just now stays for a later look.

    So does what the storage refuses to delete, and what is left after `blobs.CLEANUP_S`.
    """
    until = time.monotonic() + blobs.CLEANUP_S
    num_deleted = 0
    rest = iter(names)
    while time.monotonic() < until and (batch := list(islice(rest, _BATCH))):
        named = Operation.objects.filter(payload_file__in=batch).exclude(payload_file="")
        used = set(named.values_list("payload_file", flat=True))
        unused = takewhile(lambda _: time.monotonic() < until, (name for name in batch if name not in used))
        num_deleted += sum(map(blobs.delete_if_old, unused))
    return num_deleted


def delete_after_commit(names: Collection[str]) -> None:
    """Delete those of the files that no operation names once the current transaction is committed.

    `delete_orphans` finds what stayed. Unlike folders (`services.deletions`) they are not entered as to be deleted,
    since the same names may be written again at any time.
    """

    def delete_files() -> None:  # Django tells of one that failed by its name, which `partial` makes none of
        delete_unused(names)

    transaction.on_commit(delete_files, robust=True)


def delete_orphans(*, minute: int | None = None) -> int:
    """Look at some of the folders, at others each minute, so that all are seen within about half an hour."""
    turn = (int(time.time() / _TURN_S) if minute is None else minute) * _PREFIXES_AT_ONCE
    prefixes = [f"{(turn + number) % _NUM_PREFIXES:02x}" for number in range(_PREFIXES_AT_ONCE)]
    return delete_unused(chain.from_iterable(map(blobs.payload_names, prefixes)))
