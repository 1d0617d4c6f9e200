"""How many rows a page reads, for pages that must not read more the more there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from django.db.models import Model
from django.db.models.signals import post_init


@dataclass
class Count:
    """Rows that were read so far."""

    num_rows: int = 0


@contextmanager
def counting(model: type[Model]) -> Iterator[Count]:
    """Count the rows of the model that are read inside the block."""
    count = Count()

    def note(**_: object) -> None:
        count.num_rows += 1

    post_init.connect(note, sender=model)
    try:
        yield count
    finally:
        post_init.disconnect(note, sender=model)
