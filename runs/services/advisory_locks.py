"""The classes of advisory locks, all in one place: two of one number would wait for each other."""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class LockClass(IntEnum):
    """The first of a lock's two numbers in PostgreSQL; the second says which of its class it is."""

    WORKER = 7_767_101
    RECIPE_SLOTS = 7_767_102
    DATASET_VERSION = 7_767_103
    DATASET_SLOT = 7_767_104
    IDEMPOTENCY_KEY = 7_767_105
