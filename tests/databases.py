"""Starts one PostgreSQL and one Redis from wheels before pytest-django reads the settings (`-p tests.databases`)."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

_stack = ExitStack()


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: the tests share the machine with servers


def start() -> None:
    """Run both servers in a fresh folder and point the settings at them."""
    folder = Path(_stack.enter_context(tempfile.TemporaryDirectory(prefix="mintweb-tests-"))) / "data"
    os.environ["MINTWEB_DATA_DIR"] = str(folder)
    for name in ("DATABASE_URL", "REDIS_URL", "MINTWEB_BASE_MODELS", "MINTWEB_API_KEY"):
        os.environ.pop(name, None)
    # Tests enter rows of states without files: the storage is the right one nevertheless.
    (folder / "storage").mkdir(parents=True)
    (folder / "storage" / "mintweb-storage.txt").touch()
    from mintweb import embedded

    os.environ["DATABASE_URL"], os.environ["REDIS_URL"] = _stack.enter_context(
        embedded.running(folder, durable=False)
    )


def pytest_unconfigure() -> None:
    """Stop the servers after everything else."""
    _stack.close()


start()
