"""What counts as another engine, and how far apart two answers are."""

from __future__ import annotations

import numpy as np
import pytest

from gpuworker.comparisons import differences, largest_difference
from runs.schemas import results

METRICS = {"loss:sum": 2.0, "tokens:sum": 4.0}
PRESENT = {"torch": "2.14.0", "device": "cuda:1", "threads": "1"}


@pytest.mark.parametrize(
    ("earlier", "words"),
    [
        ({}, ""),
        (PRESENT, ""),
        ({"device": "cuda:0"}, ""),
        ({"colour": "green"}, ""),
        ({"device": "cpu"}, "device cpu -> cuda"),
        ({"torch": "2.13.0", "threads": "2"}, "threads 2 -> 1, torch 2.13.0 -> 2.14.0"),
    ],
)
def test_only_what_both_know_and_what_matters_is_a_difference(earlier: dict[str, str], words: str) -> None:
    found = differences([earlier, earlier], PRESENT)
    assert str(found) == words
    assert bool(found) is bool(words)


def test_what_does_not_tell_its_code_is_of_an_earlier_version() -> None:
    present = {**PRESENT, "code": "abc"}
    assert str(differences([PRESENT], present)) == "code unknown -> abc"
    assert str(differences([{}], present)) == "code unknown -> abc"
    assert not differences([present], present)
    assert not differences([], present)


def answer(values: list[float], *, loss: float = 2.0) -> bytes:
    return results.encode_forward_backward(
        [np.array(values, dtype=np.float32)], {**METRICS, "loss:sum": loss}
    )


def test_a_difference_is_relative_above_one_and_absolute_below() -> None:
    stored = answer([-0.5, -8.0])
    assert largest_difference(stored, stored) == 0.0
    assert largest_difference(stored, answer([-0.5, -8.4])) == pytest.approx(0.05, rel=1e-5)
    assert largest_difference(stored, answer([-0.75, -8.0])) == pytest.approx(0.25)
    assert largest_difference(stored, answer([-0.5, -8.0], loss=3.0)) == pytest.approx(0.5)
    assert largest_difference(stored, answer([-0.5])) == float("inf")
