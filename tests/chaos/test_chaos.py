"""The smaller sizes of the chaos driver; `make chaos-full` runs the large ones."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.chaos import plan
from tests.up.instances import ROOT, clean_environment

LIMIT_S = 900


def chaos(*arguments: str) -> dict[str, Any]:
    """Run the driver, which judges by itself, and return its report."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.e2e
@pytest.mark.timeout(LIMIT_S)
def test_nothing_is_lost_doubled_or_wrong() -> None:
    report = chaos("--seed", "7", "--kills", "100", "--zombies", "20", "--faults", "20")
    assert sum(report["kills"].values()) == 100
    assert report["exits"]["worker -9"] >= 80
    assert report["replays"] > 0
    assert report["ops"] > 1000


@pytest.mark.e2e
@pytest.mark.timeout(LIMIT_S)
def test_adapters_and_moments_are_those_of_an_undisturbed_run() -> None:
    report = chaos(
        *(
            "--engine",
            "torch",
            "--seed",
            "7",
            "--kills",
            "25",
            "--zombies",
            "3",
            "--faults",
            "3",
            "--runs",
            "4",
        )
    )
    assert sum(report["kills"].values()) == 25
    assert report["replays"] > 0


def test_a_seed_names_one_plan() -> None:
    sizes = {"kills": 30, "zombies": 10, "faults": 10}
    first = plan.make_plan(1, **sizes)
    assert plan.make_plan(1, **sizes) == first
    assert plan.digest_of(plan.make_plan(2, **sizes)) != plan.digest_of(first)
    families = [fault.family for fault in first]
    assert (families.count("kill"), families.count("zombie"), families.count("fault")) == (30, 10, 10)


def test_no_more_than_two_faults_come_without_a_rest() -> None:
    """Four workers in a row that die with an operation make it poison, which is given up by design."""
    settles = [fault.settles for fault in plan.make_plan(5, kills=300, zombies=30, faults=30)]
    assert all(any(settles[index : index + 3]) for index in range(len(settles) - 2))
