"""AdamW on the flat buffers of adapters: the steps of many runs together. Called by the engine, once per cycle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gpuworker.engine.adapters import Adapter
from gpuworker.engine.exceptions import EngineError, OutOfMemory
from gpuworker.engine.memory import is_out_of_memory, with_room
from gpuworker.engine.types import AdamParams, OptimStep, OptimStepResult

Outcomes: TypeAlias = dict[int, OptimStepResult | EngineError]

_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class _Due:
    """A step to be taken."""

    adapter: Adapter
    params: AdamParams


@dataclass(frozen=True)
class _Update:
    """A step that moves the weights; `clip` is what its gradient is multiplied with, 1 without clipping."""

    due: _Due
    gradient_P: Tensor
    clip: float


def run(
    requests: Sequence[OptimStep], find_adapter: Callable[[str], Adapter], *, free: Callable[[], None]
) -> list[OptimStepResult | EngineError]:
    """Apply the accumulated gradients with AdamW and clear them; one outcome per request, in order.

    All runs together: one wait for the device, whose answer are the norms, and one fused call for all that have
    the same hyperparameters. Every run gets the bits that it gets alone. Without a gradient, or with one that is
    zero everywhere, the step counts, the moments decay and decoupled weight decay acts, but old momentum does not
    move the weights. A gradient that is not finite is dropped: neither weights nor moments nor step count change.
    A step that finds no room leaves its adapter and gradient as they were.

    Args:
        free: makes room on the device.

    Source: Loshchilov and Hutter 2019, algorithm 2, in the form of torch.optim.AdamW.
    """
    outcomes: Outcomes = {}
    dues: dict[int, _Due] = {}
    for index, request in enumerate(requests):
        try:
            dues[index] = _Due(find_adapter(request.adapter_id), request.params)
        except EngineError as error:
            outcomes[index] = error
    for together in _without_repeats(dues):
        outcomes.update(_take(together, free))
    return [outcomes[index] for index in range(len(requests))]


def _without_repeats(dues: Mapping[int, _Due]) -> Iterator[dict[int, _Due]]:
    """Cut a list where an adapter comes again: its second step builds on its first."""
    stretch: dict[int, _Due] = {}
    seen: set[Adapter] = set()
    for index, due in dues.items():
        if due.adapter in seen:
            yield stretch
            stretch, seen = {}, set()
        stretch[index] = due
        seen.add(due.adapter)
    yield stretch


def _take(dues: Mapping[int, _Due], free: Callable[[], None]) -> Outcomes:
    """Take steps together; where the device has no room for that, one after another."""
    if len(dues) == 1:
        ((index, due),) = dues.items()
        try:
            return {index: with_room(lambda: _step([due])[0], free=free, what="this optim_step")}
        except OutOfMemory as error:
            return {index: error}
    try:
        return dict(zip(dues, _step(list(dues.values())), strict=True))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    outcomes: Outcomes = {}
    for index, due in dues.items():
        outcomes.update(_take({index: due}, free))
    return outcomes


def _step(dues: Sequence[_Due]) -> list[OptimStepResult]:
    """Take one step of each of some different adapters. What takes memory comes before the first change."""
    norms = _norms([due.adapter for due in dues])
    updates = [
        _Update(due, due.adapter.gradient_P, _clip(due.params, norm))
        for due, norm in zip(dues, norms, strict=True)
        if due.adapter.gradient_P is not None and norm > 0.0 and math.isfinite(norm)
    ]
    calls = [(group, _step_counts(group)) for group in _groups(updates)]
    for group, step_counts in calls:
        _apply(group, step_counts)
    _refresh([update.due.adapter for update in updates])
    return [_finish(due, norm) for due, norm in zip(dues, norms, strict=True)]


def _norms(adapters: Sequence[Adapter]) -> list[float]:
    """Return the gradients' norms, fetched at once; 0 where there is none."""
    gradients = [adapter.gradient_P for adapter in adapters if adapter.gradient_P is not None]
    if not gradients:
        return [0.0] * len(adapters)
    # In float64 the squares of float32 numbers neither overflow nor vanish.
    norms = torch.stack([torch.linalg.vector_norm(one, dtype=torch.float64) for one in gradients]).tolist()
    found = iter(norms)
    return [0.0 if adapter.gradient_P is None else next(found) for adapter in adapters]


def _clip(params: AdamParams, norm: float) -> float:
    return min(1.0, params.grad_clip_norm / (norm + _CLIP_EPSILON)) if params.grad_clip_norm > 0 else 1.0


def _groups(updates: Sequence[_Update]) -> list[list[_Update]]:
    """Return the updates by what AdamW takes as numbers of a whole call."""
    groups: dict[AdamParams, list[_Update]] = {}
    for update in updates:
        groups.setdefault(replace(update.due.params, grad_clip_norm=0.0), []).append(update)
    return list(groups.values())


def _step_counts(group: Sequence[_Update]) -> list[Tensor]:
    """Return each adapter's step count as a scalar on its device, brought there in one copy."""
    counts = [float(update.due.adapter.step) for update in group]
    return list(torch.tensor(counts, device=group[0].gradient_P.device).unbind())


def _apply(group: Sequence[_Update], step_counts: list[Tensor]) -> None:
    adapters = [update.due.adapter for update in group]
    params = group[0].due.params
    clipped = [update for update in group if update.clip != 1.0]
    if clipped:
        torch._foreach_mul_([update.gradient_P for update in clipped], [update.clip for update in clipped])
    adamw(
        [adapter.master_P for adapter in adapters],
        [update.gradient_P for update in group],
        [adapter.exp_avg_P for adapter in adapters],
        [adapter.exp_avg_sq_P for adapter in adapters],
        [],
        step_counts,
        fused=True,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )


def _refresh(adapters: Sequence[Adapter]) -> None:
    """Bring the working copies up to date, where they are not the master weights themselves."""
    stale = [adapter for adapter in adapters if adapter.working_P is not adapter.master_P]
    if stale:
        torch._foreach_copy_([one.working_P for one in stale], [one.master_P for one in stale])


def _finish(due: _Due, norm: float) -> OptimStepResult:
    """Clear the gradient, do what a step does without one, and count it unless it is skipped."""
    adapter = due.adapter
    adapter.gradient_P = None
    is_skipped = not math.isfinite(norm)
    if norm == 0.0:
        _decay(adapter, due.params)
    if not is_skipped:
        adapter.step += 1
    return OptimStepResult(step=adapter.step, grad_norm=norm, skipped=is_skipped)


def _decay(adapter: Adapter, params: AdamParams) -> None:
    adapter.exp_avg_P.mul_(params.beta1)
    adapter.exp_avg_sq_P.mul_(params.beta2)
    if params.weight_decay != 0:
        adapter.master_P.mul_(1 - params.learning_rate * params.weight_decay)
        adapter.refresh()
