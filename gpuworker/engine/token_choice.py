"""Choosing the next token of each sequence from its logits.

Every row is filtered and drawn on its own with a number that only (seed, sample, position) fix,
so a sequence does not depend on what is sampled beside it.
Axes: S sequences, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpuworker.engine.types import SamplingParams

_MASK = 2**64 - 1
_MIN_TEMPERATURE = torch.finfo(torch.float32).tiny
"""What is smaller may be 0 on the device, and 0 / 0 is not a number."""
_LIKELY = 1024
"""On a CPU so many of the likeliest tokens are sorted first, and all of them only where their mass does not do."""


class Draw(NamedTuple):
    """How to choose one row's token; `sample` and `position` key its random number."""

    params: SamplingParams
    sample: int
    position: int


def uniform(seed: int, sample: int, position: int) -> float:
    """Return a number in [0, 1) fixed by its three keys.

    Source: the output function of SplitMix64 (Steele, Lea and Flood 2014), once per key.
    """
    state = 0
    for key in (seed, sample, position):
        state = _mix((state ^ key) & _MASK)
    return (state >> 11) / 2**53


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def choose(logits_SV: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
    """Return one token per row and its log-probability under the unscaled logits.

    Rows that are drawn alike go together; the device is waited for once, at the end. A row that is not finite gets
    any token, and a log-probability that is not finite.
    """
    tokens_S = logits_SV.argmax(-1)
    vocab_size = logits_SV.shape[1]
    alike: dict[int | None, list[int]] = defaultdict(list)
    for row, draw in enumerate(draws):
        if draw.params.temperature > 0:
            alike[_num_candidates(draw.params, vocab_size)].append(row)
    for num_candidates, rows in alike.items():
        own = [draws[row] for row in rows]
        index_S = torch.tensor(rows, device=logits_SV.device)
        scaled_SV = _scaled(logits_SV.index_select(0, index_S), own)
        tokens_S[index_S] = _draw(scaled_SV, own, num_candidates)
    logprobs_S = logits_SV.log_softmax(-1).gather(1, tokens_S[:, None])[:, 0]
    tokens, logprobs = torch.stack([tokens_S.double(), logprobs_S.double()]).tolist()
    return [int(token) for token in tokens], logprobs


def _num_candidates(params: SamplingParams, vocab_size: int) -> int | None:
    """Return how many of the likeliest tokens are looked at; None where no filter asks for their order."""
    if 0 < params.top_k < vocab_size:
        return params.top_k
    return vocab_size if params.top_p < 1.0 else None


def _scaled(logits_SV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Divide logits by the temperatures, in place.

    The likeliest token is brought to 0 first: whatever overflows then is -inf, so that the smallest temperatures
    leave that token alone, as temperature 0 does.
    """
    temperatures_S1 = _column([max(draw.params.temperature, _MIN_TEMPERATURE) for draw in draws], logits_SV)
    return logits_SV.sub_(logits_SV.amax(-1, keepdim=True)).div_(temperatures_S1)


def _draw(scaled_SV: Tensor, draws: Sequence[Draw], num_candidates: int | None) -> Tensor:
    """Draw among the candidates, or among the fewest of them whose mass reaches top_p."""
    if num_candidates is None:
        return _invert(torch.softmax(scaled_SV, dim=-1), draws)
    limits_S1 = _column([d.params.top_p if d.params.top_p < 1.0 else math.inf for d in draws], scaled_SV)
    if num_candidates < scaled_SV.shape[1]:
        best_SK, ids_SK = scaled_SV.topk(num_candidates)
        return _draw_sorted(torch.softmax(best_SK, dim=-1), ids_SK, limits_S1, draws)
    if scaled_SV.is_cuda or num_candidates <= _LIKELY:
        return _draw_among_all(scaled_SV, limits_S1, draws)
    best_SK, ids_SK = scaled_SV.topk(_LIKELY)
    probs_SK = best_SK.sub_(scaled_SV.logsumexp(-1, keepdim=True)).exp_()
    tokens_S = _draw_sorted(probs_SK, ids_SK, limits_S1, draws)
    spread = (probs_SK.sum(-1) < limits_S1[:, 0]).nonzero()[:, 0]
    if len(spread):
        own = [draws[row] for row in spread.tolist()]
        tokens_S[spread] = _draw_among_all(scaled_SV[spread], limits_S1[spread], own)
    return tokens_S


def _draw_among_all(scaled_SV: Tensor, limits_S1: Tensor, draws: Sequence[Draw]) -> Tensor:
    best_SV, ids_SV = scaled_SV.sort(descending=True, stable=True)
    return _draw_sorted(torch.softmax(best_SV, dim=-1), ids_SV, limits_S1, draws)


def _draw_sorted(probs_SK: Tensor, ids_SK: Tensor, limits_S1: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw among candidates in order of their probability, as far as their mass is wanted."""
    # Kept are the tokens before which the mass is still below top_p; where there are none, the first is drawn.
    is_cut_SK = probs_SK.cumsum(-1) - probs_SK >= limits_S1
    found_S = _invert(probs_SK.masked_fill(is_cut_SK, 0.0), draws)
    return ids_SK.gather(1, found_S[:, None])[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None]


def _invert(probs_SV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return for each row the first index whose cumulated mass exceeds its random number."""
    mass_SV = probs_SV.cumsum(-1)
    numbers = [uniform(draw.params.seed, draw.sample, draw.position) for draw in draws]
    wanted_S1 = _column(numbers, probs_SV) * mass_SV[:, -1:]
    found_S = torch.searchsorted(mass_SV, wanted_S1, right=True)[:, 0]
    # float32 may round the number up to the whole mass: then take the last token with any mass.
    last_S = torch.searchsorted(mass_SV, mass_SV[:, -1:].contiguous())[:, 0]
    # In a row of NaN nothing is found: an index behind the last would make a CUDA device useless for good.
    return torch.minimum(found_S, last_S).clamp_(max=mass_SV.shape[1] - 1)
