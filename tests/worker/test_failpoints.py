"""Failpoints: nothing happens unless a test asks for it, and then once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gpuworker import failpoints


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_an_armed_point_acts_at_the_given_arrival_and_once() -> None:
    failpoints.arm("after_compute:raise@3,before_commit:raise@1")
    for _ in range(2):
        failpoints.reach("after_compute")
    with pytest.raises(failpoints.FailpointReached, match="after_compute"):
        failpoints.reach("after_compute")
    failpoints.reach("after_compute")
    with pytest.raises(failpoints.FailpointReached):
        failpoints.reach("before_commit")


def test_a_point_that_is_not_armed_does_nothing() -> None:
    for name in failpoints.NAMES:
        failpoints.reach(name)


@pytest.mark.parametrize(
    "text", ["elsewhere:kill@1", "after_commit:explode@1", "after_commit:kill@0", "after_commit"]
)
def test_a_list_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="failpoint"):
        failpoints.arm(text)


def test_kill_ends_the_process_without_a_word() -> None:
    code = "from gpuworker import failpoints as f; f.arm('after_commit:kill@1'); f.reach('after_commit')"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, b"", b"")
