"""Files in storage: one bad read is no reason to give something up."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from runs.services import blobs


def failing(times: int, error: OSError) -> Callable[[], bytes]:
    """Return a read that fails so often before it succeeds."""
    left = [error] * times

    def read() -> bytes:
        if left:
            raise left.pop()
        return b"whole"

    return read


def test_what_fails_for_a_moment_is_read_again() -> None:
    assert blobs.patiently(failing(2, OSError(errno.EIO, "input/output error"))) == b"whole"


def test_what_fails_for_good_is_told() -> None:
    with pytest.raises(OSError, match="input/output error"):
        blobs.patiently(failing(9, OSError(errno.EIO, "input/output error")))


def test_what_is_not_there_is_told_at_once() -> None:
    with pytest.raises(FileNotFoundError):
        blobs.patiently(failing(1, FileNotFoundError()))
