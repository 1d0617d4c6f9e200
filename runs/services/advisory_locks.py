"""Advisory locks of PostgreSQL. Their classes are all in one place: two of one number would wait for each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum, unique

from django.db import connection


@unique
class LockClass(IntEnum):
    """The first of a lock's two numbers in PostgreSQL; the second says which of its class it is."""

    WORKER = 7_767_101
    RECIPE_SLOTS = 7_767_102
    DATASET_VERSION = 7_767_103
    DATASET_SLOT = 7_767_104
    IDEMPOTENCY_KEY = 7_767_105
    WEBHOOKS = 7_767_106


@contextmanager
def any_lock(lock_class: LockClass, numbers: Sequence[int]) -> Iterator[bool]:
    """Hold one of these advisory locks, if one is free; PostgreSQL frees it if this process dies."""
    with connection.cursor() as cursor:
        held = None
        for number in numbers:
            cursor.execute("SELECT pg_try_advisory_lock(%s, %s)", [lock_class, number])
            if cursor.fetchone()[0]:
                held = number
                break
    try:
        yield held is not None
    finally:
        if held is not None:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_unlock(%s, %s)", [lock_class, held])
