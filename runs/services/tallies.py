"""How many rows a person has and what they take, without counting them."""

from __future__ import annotations

from typing import Final, NamedTuple

from django.db import connection
from django.db.models import Sum

from runs.models import CatalogTally, User

Kind = CatalogTally.Kind

# One statement, so that a reader sees the changes either before or after they were added up.
_ADD_UP: Final = """
WITH gone AS (DELETE FROM runs_catalogtally RETURNING owner_id, kind, num, size_bytes)
INSERT INTO runs_catalogtally (owner_id, kind, num, size_bytes)
SELECT owner_id, kind, sum(num), sum(size_bytes) FROM gone GROUP BY owner_id, kind
HAVING sum(num) <> 0 OR sum(size_bytes) <> 0
"""


class Total(NamedTuple):
    """A number of rows and the bytes they name."""

    num: int
    size_bytes: int


def total_of(user: User, kind: Kind) -> Total:
    """Return what a person has of a kind."""
    sums = CatalogTally.objects.filter(owner=user, kind=kind).aggregate(Sum("num"), Sum("size_bytes"))
    return Total(int(sums["num__sum"] or 0), int(sums["size_bytes__sum"] or 0))


def checkpoint_bytes() -> int:
    """Return what the checkpoints of all people take, named and ephemeral."""
    return int(CatalogTally.objects.aggregate(total=Sum("size_bytes"))["total"] or 0)


def add_up() -> None:
    """Make one tally of a person's many; housekeeping calls it."""
    with connection.cursor() as cursor:
        cursor.execute(_ADD_UP)
