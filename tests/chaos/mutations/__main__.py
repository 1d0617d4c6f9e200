"""`python -m tests.chaos.mutations [NAME ...]`: apply each mutation to a copy of the tree; its tests must fail there.

Prints a table and exits with 1 unless every protection's tests are green with it and red without it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.chaos.mutations.catalog import FAST, MUTATIONS, Mutation

_ROOT: Final = Path(__file__).resolve().parent.parent.parent.parent
_COPIED: Final = ("gpuworker", "mintweb", "runs", "tests", "templates", "static", "examples")
_FILES: Final = ("manage.py", "pyproject.toml")
_FAILED: Final = 1  # pytest's exit code for "tests were run, some failed"
_LIMIT_S: Final = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutations to try (all)")
    parser.add_argument("--fast", action="store_true", help="only those that take seconds")
    args = parser.parse_args(arguments)
    names = args.names or (FAST if args.fast else [mutation.name for mutation in MUTATIONS])
    chosen = [mutation for mutation in MUTATIONS if mutation.name in names]
    if len(chosen) != len(names):
        parser.error(f"the mutations are: {', '.join(mutation.name for mutation in MUTATIONS)}")
    with tempfile.TemporaryDirectory(prefix="mintweb-mutations-") as folder:
        tree = Path(folder)
        _copy(tree)
        num_noticed = _try_all(tree, chosen)
    sys.stdout.write(f"{num_noticed} of {len(chosen)} protections are tested\n")
    return 0 if num_noticed == len(chosen) else 1


def _copy(tree: Path) -> None:
    for name in _COPIED:
        shutil.copytree(
            _ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules")
        )
    for name in _FILES:
        shutil.copy2(_ROOT / name, tree / name)


def _try_all(tree: Path, chosen: Sequence[Mutation]) -> int:
    """Print a line for each mutation and return how many were noticed."""
    tests = sorted({test for mutation in chosen for test in mutation.red})
    code, output = _pytest(tree, tests)
    if code != 0:
        sys.stdout.write(f"the tests fail without any mutation:\n{output[-3000:]}\n")
        return 0
    num_noticed = 0
    for mutation in chosen:
        started_at = time.monotonic()
        verdict = _try(tree, mutation)
        num_noticed += verdict == "red"
        seconds = time.monotonic() - started_at
        sys.stdout.write(f"{verdict:6} {seconds:4.0f} s  {mutation.name}: {mutation.protects_from}\n")
        sys.stdout.flush()
    return num_noticed


def _try(tree: Path, mutation: Mutation) -> str:
    """Return red when the tests noticed, green when they did not, and what went wrong otherwise."""
    file = tree / mutation.file
    original = file.read_text()
    if original.count(mutation.find) != 1:
        return f"found {original.count(mutation.find)} times"
    file.write_text(original.replace(mutation.find, mutation.replace))
    try:
        code, output = _pytest(tree, mutation.red)
    except subprocess.TimeoutExpired:
        return "hangs"
    finally:
        file.write_text(original)
    if code in (0, _FAILED):
        return "red" if code else "green"
    return f"pytest ended with {code}: {output[-500:]}"


def _pytest(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
