"""Learning-rate schedules: a pure function of the step, so that a loop that starts again needs no state."""

from __future__ import annotations

import math

from runs.schemas.recipes import ScheduleName


def learning_rate(
    step: int, *, peak: float, num_steps: int, schedule: ScheduleName, warmup_share: float
) -> float:
    """Return the learning rate of one optimizer step.

    Args:
        step: counted from 0; a step after the end has the last step's rate.
        warmup_share: part of all steps in which the rate rises linearly to its peak.
    Returns:
        `peak` once warm; `linear` and `cosine` fall towards 0, which the step after the last would have.
    """
    num_warmup = round(warmup_share * num_steps)
    step = min(step, num_steps - 1)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if schedule == "constant":
        return peak
    share = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return peak * (1.0 - share if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share)))
