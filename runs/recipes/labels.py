"""What the validation losses of a run are called where it is measured on several datasets: each by a name of its own.

A label depends on the datasets alone, so that it stays the same when a run goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Final

from runs.models import DatasetVersion
from runs.services import recipe_checks

SPLIT: Final = "split"
_MAX_LABEL: Final = 40


def labels_of(versions: Collection[DatasetVersion], *, has_split: bool) -> dict[int, str]:
    """Return a label for each dataset given for validation, by the key of its version.

    That is the dataset's name; where another one has it too, the name and the version's number; else the id and the number.

    Args:
        has_split: rows of the training data are held out as well, and labelled `split`.
    """
    ids = {one.pk: recipe_checks.ref_of(one) for one in versions}
    taken = [SPLIT] if has_split else []
    labels: dict[int, str] = {}
    for is_numbered in (False, True):
        forms = {one.pk: _named(one, is_numbered) for one in versions if one.pk not in labels}
        counts = Counter([*forms.values(), *labels.values(), *ids.values(), *taken])
        labels |= {pk: form for pk, form in forms.items() if counts[form] == 1}
    return ids | labels


def _named(version: DatasetVersion, is_numbered: bool) -> str:
    suffix = f"@{version.number}" if is_numbered else ""
    name = version.dataset.name[: _MAX_LABEL - len(suffix)] or version.dataset.public_id
    return f"{name}{suffix}"
