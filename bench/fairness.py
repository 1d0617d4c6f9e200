"""How evenly one worker serves runs of very different batch sizes that all want more than they get."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

import psycopg

from bench.measurements import Lab
from bench.table import Row
from mintweb import embedded

_SIZES: Final = ((1, 16), (1, 64), (4, 64), (4, 128), (8, 128), (16, 256), (32, 256), (32, 256))
"""Sequences and tokens of each in a step: 16 to 8192 tokens a run, more than one cycle takes of all together."""
_NUM_STEPS: Final = 8
_TARGET: Final = 0.95
_TIMEOUT_S: Final = 900


class Step(NamedTuple):
    """One forward_backward as the log has it."""

    num_tokens: int
    asked_at: datetime
    served_at: datetime


def fairness(lab: Lab) -> list[Row]:
    """Let eight runs submit all their steps at once; look at what each has got when the first one is through."""
    names = [f"fair{i}" for i in range(len(_SIZES))]
    run_ids = [lab.open_run(lab.newest, name) for name in names]
    batches = {
        name: [lab.batch(number, length, length, seed=step) for step in range(_NUM_STEPS)]
        for name, (number, length) in zip(names, _SIZES, strict=True)
    }
    # It answers once the last run is through.
    lab.clients[lab.newest].ask(
        "train_together", runs=names, subject=names[-1], batches=batches, weight_decay=0.0
    )
    steps = _steps(lab, run_ids)
    shares = served_shares([steps[run_id] for run_id in run_ids])
    index, sizes = jain_index(shares), [number * length for number, length in _SIZES]
    return [
        Row(
            measurement="fairness",
            what=f"{len(_SIZES)} runs that compete: Jain's index of the tokens served to each over those it asked for",
            target=f">= {_TARGET}",
            measured=f"{index:.3f}",
            is_met=index >= _TARGET,
            note=f"{min(sizes)} to {max(sizes)} tokens a step, {_NUM_STEPS} steps of each submitted ahead; "
            f"served when the first run was through: {min(shares):.2f} to {max(shares):.2f} of what was asked for",
        )
    ]


def served_shares(steps_of_runs: Sequence[Sequence[Step]]) -> list[float]:
    """Return how much of what each run asked for was served while all of them were waiting for more.

    That is from the moment when each had asked until the first had everything.
    """
    begin = max(min(step.asked_at for step in steps) for steps in steps_of_runs)
    end = min(max(step.served_at for step in steps) for steps in steps_of_runs)
    shares = []
    for steps in steps_of_runs:
        wanted = [step for step in steps if step.served_at > begin]
        served = sum(step.num_tokens for step in wanted if step.served_at <= end)
        shares.append(served / sum(step.num_tokens for step in wanted))
    return shares


def jain_index(shares: Sequence[float]) -> float:
    """Return 1 where all shares are equal, 1 / n where one has everything.

    Source: Jain, Chiu and Hawe 1984, DEC-TR-301: (sum x)^2 / (n sum x^2).
    """
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def _steps(lab: Lab, run_ids: Sequence[str]) -> Mapping[str, list[Step]]:
    """Return the forward_backwards of each run once all have their answers."""
    query = """SELECT run.public_id, op.state, op.num_tokens, op.created_at, op.finished_at FROM runs_operation op
               JOIN runs_trainingrun run ON run.id = op.run_id
               WHERE run.public_id = ANY(%s) AND op.kind = 'forward_backward'"""
    deadline = time.monotonic() + _TIMEOUT_S
    with psycopg.connect(embedded.database_url(lab.instance.data_dir), autocommit=True) as connection:
        while True:
            rows = connection.execute(query, [list(run_ids)]).fetchall()
            if all(row[1] != "queued" for row in rows):
                break
            if time.monotonic() > deadline:
                raise RuntimeError("the competing runs did not come to an end")
            time.sleep(0.5)
    if not all(row[1] == "done" for row in rows):
        raise RuntimeError("a step of the competing runs failed")
    return {run_id: [Step(*row[2:]) for row in rows if row[0] == run_id] for run_id in run_ids}
