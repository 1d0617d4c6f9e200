"""Choosing the next token of each sequence from its logits.

Every row is filtered and drawn on its own with a number that only (seed, sample, position) fix,
so a sequence does not depend on what is sampled beside it.
Axes: S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpuworker.engine.types import SamplingParams

_MASK = 2**64 - 1


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
    """Return one token per row and its log-probability under the unscaled logits."""
    tokens_S = logits_SV.argmax(-1)
    warm = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
    plain = [row for row in warm if not _is_filtered(draws[row].params, logits_SV.shape[1])]
    if plain:
        tokens_S[plain] = _draw_plain(logits_SV[plain], [draws[row] for row in plain])
    for row in warm:
        if row not in plain:
            tokens_S[row] = _draw_filtered(logits_SV[row], draws[row])
    logprobs_S = logits_SV.log_softmax(-1).gather(1, tokens_S[:, None])[:, 0]
    return tokens_S.tolist(), logprobs_S.tolist()


def _is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    return params.top_p < 1.0 or 0 < params.top_k < vocab_size


def _draw_plain(logits_SV: Tensor, draws: Sequence[Draw]) -> Tensor:
    temperatures = [draw.params.temperature for draw in draws]
    scaled_SV = logits_SV / torch.tensor(temperatures, device=logits_SV.device)[:, None]
    return _invert(torch.softmax(scaled_SV, dim=-1), draws)


def _draw_filtered(logits_V: Tensor, draw: Draw) -> int:
    """Draw among the top_k tokens, then among the fewest of them whose mass reaches top_p."""
    params, vocab_size = draw.params, len(logits_V)
    scaled_V = logits_V / params.temperature
    k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    best, ids = scaled_V.topk(k) if k < vocab_size else scaled_V.sort(descending=True, stable=True)
    probs = torch.softmax(best, dim=-1)
    if params.top_p < 1.0:
        # Keep the tokens before which the mass is still below top_p: always the first.
        keep = max(1, int((probs.cumsum(0) - probs < params.top_p).sum()))
        probs, ids = probs[:keep], ids[:keep]
    return int(ids[_invert(probs[None], [draw])[0]])


def _invert(probs_SV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return for each row the first index whose cumulated mass exceeds its random number."""
    mass_SV = probs_SV.cumsum(-1)
    numbers = [uniform(draw.params.seed, draw.sample, draw.position) for draw in draws]
    wanted_S1 = torch.tensor(numbers, device=probs_SV.device)[:, None] * mass_SV[:, -1:]
    found_S = torch.searchsorted(mass_SV, wanted_S1, right=True)[:, 0]
    # float32 may round the number up to the whole mass: then take the last token with any mass.
    last_S = torch.searchsorted(mass_SV, mass_SV[:, -1:].contiguous())[:, 0]
    return torch.minimum(found_S, last_S)
