"""The datasets that a new run's form offers: the newest of each that can be trained on, and what is chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from django.db.models import Q

from runs.models import DatasetVersion, User
from runs.pages import run_form
from runs.services import access, datasets, recipe_checks

# One to train on, the others to validate on; a form that names more is refused.
_MAX_CHOSEN: Final = 1 + run_form.MAX_VALIDATION_DATASETS


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """A dataset that can be trained on; `ref` names the version."""

    ref: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What there is to choose from: another `word` where that is something else, and whether there may soon be more."""

    word: str
    is_growing: bool


def offer_to(user: User) -> Offer:
    """Return what a form that is open compares with what it has: datasets become ready, get names, are deleted."""
    states = DatasetVersion.State
    seen = DatasetVersion.objects.filter(
        dataset__in=access.datasets_of(user), state__in=(states.READY, states.CHECKING)
    )
    rows = list(seen.order_by("pk").values_list("pk", "state", "dataset__name"))
    ready = [row for row in rows if row[1] == states.READY]
    word = hashlib.sha256(repr(ready).encode()).hexdigest()[:16]
    return Offer(word=word, is_growing=len(ready) < len(rows))


def choices_of(user: User, chosen: Sequence[str]) -> list[DatasetChoice]:
    """Return the newest ready version of each dataset that can be trained on, and every version that is chosen.

    Args:
        chosen: references as a form or an address has them; what names no version is passed over.
    """
    trainable = DatasetVersion.objects.filter(
        dataset__in=access.datasets_of(user),
        state=DatasetVersion.State.READY,
        kind__in=recipe_checks.TRAINABLE,
    )
    newest = trainable.order_by("dataset_id", "-number").distinct("dataset_id")
    # Reports may be large, and a form shows nothing of them.
    shown = trainable.filter(Q(pk__in=newest.values("pk")) | _named(chosen)).defer("report")
    ordered = shown.select_related("dataset").order_by("-dataset__created_at", "-dataset_id", "-number")
    return [
        DatasetChoice(
            ref=recipe_checks.ref_of(version),
            label=f"{version.dataset.name} \u00b7 version {version.number}, {version.num_rows:,} rows",
        )
        for version in ordered
    ]


def _named(refs: Sequence[str]) -> Q:
    """Return the condition that a version is one of those that are named with their number."""
    named = Q(pk__in=[])
    for ref in list(dict.fromkeys(refs))[:_MAX_CHOSEN]:
        public_id, number = datasets.parts_of(ref)
        if number:
            named |= Q(dataset__public_id=public_id, number=number)
    return named
