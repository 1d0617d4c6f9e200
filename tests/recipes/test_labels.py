"""What the losses of several held-out datasets are called."""

from __future__ import annotations

from itertools import permutations

import pytest

from runs.models import Dataset, DatasetVersion
from runs.recipes.labels import labels_of

LONG = "answers of a pirate who sails the seven seas"


def versions(*named: tuple[str, int, int]) -> list[DatasetVersion]:
    """Return one version of each (name, number of the dataset, number of the version)."""
    return [
        DatasetVersion(pk=pk, dataset=Dataset(public_id=f"ds-{dataset:012x}", name=name), number=number)
        for pk, (name, dataset, number) in enumerate(named)
    ]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ([("a", 1, 1), ("b", 2, 7)], ["a", "b"]),
        ([(LONG, 1, 1), ("", 2, 1)], [LONG[:40], "ds-000000000002"]),
        ([("a", 1, 1), ("a", 1, 2), ("b", 2, 1)], ["a@1", "a@2", "b"]),
        ([(LONG, 1, 1), (LONG, 1, 12)], [f"{LONG[:38]}@1", f"{LONG[:37]}@12"]),
        ([(LONG + "s", 1, 1), (LONG + "t", 2, 1)], ["ds-000000000001@1", "ds-000000000002@1"]),
        ([("split", 1, 3), ("a", 2, 1)], ["split@3", "a"]),
        ([("a", 1, 1), ("a", 2, 1), ("a", 1, 2)], ["ds-000000000001@1", "ds-000000000002@1", "a@2"]),
        # Names that look like what tells others apart.
        ([("a", 1, 1), ("a", 1, 2), ("a@1", 2, 1)], ["ds-000000000001@1", "a@2", "a@1"]),
        (
            [("a", 1, 1), ("a", 2, 1), ("ds-000000000001@1", 3, 1)],
            [*(f"ds-{n:012x}@1" for n in (1, 2)), "ds-000000000001@1@1"],
        ),
        ([("", 1, 1), ("", 1, 2)], ["ds-000000000001@1", "ds-000000000001@2"]),
    ],
)
def test_each_dataset_has_a_label_of_its_own_whatever_their_order(
    named: list[tuple[str, int, int]], expected: list[str]
) -> None:
    given = versions(*named)

    for order in permutations(given):
        labels = labels_of(order, has_split=True)
        assert [labels[one.pk] for one in given] == expected
    assert len({"split", *expected}) == len(expected) + 1
    assert max(len(label) for label in expected) <= 40


def test_a_dataset_called_split_keeps_its_name_where_no_rows_are_held_out() -> None:
    assert labels_of(versions(("split", 1, 3)), has_split=False) == {0: "split"}
