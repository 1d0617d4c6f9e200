"""The n-th call sweep in a size for every day; `make sweep` breaks each call in each way."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.chaos.sweep_calls import KINDS
from tests.up.instances import ROOT, clean_environment

LIMIT_S = 600


def sweep(*arguments: str) -> dict[str, Any]:
    """Run the sweep, which judges by itself, and return its report."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.sweep", *arguments],
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
def test_any_call_may_fail() -> None:
    """Some of the calls, some in each way; others from one code's version to the next, as the numbers move."""
    report = sweep("--every", "41")
    assert report["ops"] >= 20
    assert all(report["calls"][kind] for kind in KINDS)
    assert set(report["passes"]) == {"once", "lost", "forever"}
    assert report["not_reached"] <= sum(report["passes"].values()) // 4
