"""What long-lived processes keep from the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest
from django.conf import settings

from runs import heap


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """Let the collector look at everything, though another test may have imported the web, and again afterwards."""
    gc.unfreeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_nothing_is_collected_meanwhile_and_what_is_there_never() -> None:
    with heap.lasting():
        assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


@pytest.mark.usefixtures("nothing_frozen")
def test_a_start_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), heap.lasting():
        raise ImportError
    assert gc.isenabled()


def test_the_web_freezes_its_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import mintweb.asgi, gc; print(gc.get_freeze_count(), gc.isenabled())"],
        cwd=settings.BASE_DIR,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    frozen, is_enabled = done.stdout.split()
    assert int(frozen) > 50_000
    assert is_enabled == "True"
