"""Fixtures that start the real `manage.py up`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .instances import Instance


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A running mintweb for the tests of one module."""
    instance = Instance(tmp_path_factory.mktemp("up") / "data")
    instance.start()
    yield instance
    if instance.returncode is None:
        instance.stop()


@pytest.fixture
def make_instance(tmp_path: Path) -> Iterator[Callable[..., Instance]]:
    """Make instances that are killed at the end if the test left them running."""
    made: list[Instance] = []

    def make(**settings: str) -> Instance:
        made.append(Instance(tmp_path / f"data{len(made)}", **settings))
        return made[-1]

    yield make
    for instance in made:
        if instance.process is not None and instance.returncode is None:
            instance.process.kill()
            instance.process.wait()
