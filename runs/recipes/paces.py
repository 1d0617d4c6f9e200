"""How fast this server has trained on a base model before: the pace of earlier steps of about the same size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from runs.models import Metric, TrainingRun

MIN_STEPS: Final = 20
_NUM_RUNS: Final = 10
_STEPS_OF_A_RUN: Final = 200
# Steps of a quarter to four times the tokens: smaller and larger ones use the device differently.
_SIMILAR: Final = 4.0
_LOW_PERCENTILE, _HIGH_PERCENTILE = 10, 90


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Tokens a second from optimizer step to optimizer step, with the validation and saves between them.

    `low` and `high` are the 10th and 90th percentile of `num_steps` steps.
    """

    low: float
    high: float
    num_steps: int


def of_base_model(base_model: str, *, step_tokens: float) -> Pace | None:
    """Return the pace of the latest steps of about `step_tokens` tokens, of runs that this server drove.

    None until there are 20 such steps.
    """
    runs = TrainingRun.objects.filter(base_model=base_model, recipe__isnull=False, step__gt=0)
    rates: list[float] = []
    for run in runs.order_by("-last_applied_at")[:_NUM_RUNS]:
        tokens = _latest(run, "tokens")
        rates += [
            rate
            for seq, rate in _latest(run, "tokens_per_s").items()
            if 0 < rate < math.inf
            and step_tokens / _SIMILAR <= tokens.get(seq, 0.0) <= step_tokens * _SIMILAR
        ]
    if len(rates) < MIN_STEPS:
        return None
    low, high = np.percentile(np.array(rates), [_LOW_PERCENTILE, _HIGH_PERCENTILE])
    return Pace(low=float(low), high=float(high), num_steps=len(rates))


def _latest(run: TrainingRun, name: str) -> dict[int, float]:
    rows = Metric.objects.filter(run=run, name=name).order_by("-seq")[:_STEPS_OF_A_RUN]
    return dict(rows.values_list("seq", "value"))
