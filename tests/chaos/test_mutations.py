"""The tests notice when a protection is gone; `make mutations` tries all of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.chaos.mutations.catalog import FAST, MUTATIONS, Mutation
from tests.up.instances import ROOT, clean_environment

LIMIT_S = 600


@pytest.mark.e2e
@pytest.mark.timeout(LIMIT_S)
def test_a_protection_that_is_taken_away_is_missed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.mutations", "--fast"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_the_code(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.find) == 1
    assert all((ROOT / test.partition("::")[0]).is_file() for test in mutation.red)


def test_the_fast_ones_are_there() -> None:
    assert set(FAST) <= {mutation.name for mutation in MUTATIONS}
