from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gpuworker.engine import token_choice
from gpuworker.engine.token_choice import Draw, choose, uniform
from gpuworker.engine.types import SamplingParams

LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0, 1.9])


def draws(num: int, **params: float) -> list[Draw]:
    settings = SamplingParams(max_tokens=1, seed=5, **params)  # type: ignore[arg-type]
    return [Draw(settings, sample, 3) for sample in range(num)]


def frequencies(num: int, **params: float) -> np.ndarray:
    tokens, _ = choose(LOGITS.expand(num, -1).clone(), draws(num, **params))
    return np.bincount(tokens, minlength=len(LOGITS)) / num


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 2}, [0, 5]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.5}, [0, 5]),
        ({"top_p": 1e-6}, [0]),
        ({"top_p": 1e-60}, [0]),
        ({"top_k": 3, "top_p": 0.85}, [0, 2, 5]),
        ({"top_k": 3, "top_p": 0.8}, [0, 5]),
    ],
)
def test_frequencies_follow_the_filtered_distribution(params: dict[str, float], kept: list[int]) -> None:
    num = 4000
    expected = np.zeros(len(LOGITS))
    scaled = LOGITS[kept].double() / params.get("temperature", 1.0)
    expected[kept] = torch.softmax(scaled, -1)
    spread = np.sqrt(expected * (1 - expected) / num)
    assert (np.abs(frequencies(num, **params) - expected) <= 4.5 * spread + 1e-12).all()


def test_top_p_among_many_tokens_is_what_sorting_all_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row's mass is within the tokens looked at first, the other's is spread over more."""
    generator = torch.Generator().manual_seed(0)
    peaked, flat = torch.randn(2, 600, generator=generator) * torch.tensor([[3.0], [0.1]])
    logits = torch.stack([peaked, flat] * 100)
    wanted = draws(len(logits), top_p=0.9)
    every, _ = choose(logits, wanted)
    monkeypatch.setattr(token_choice, "_LIKELY", 64)
    assert choose(logits, wanted)[0] == every
    assert 2 < len(set(every[::2])) < 64 < len(set(every[1::2]))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert frequencies(3, temperature=0.0)[0] == 1.0


def test_logprobs_are_those_of_the_unscaled_model() -> None:
    tokens, logprobs = choose(LOGITS.expand(50, -1).clone(), draws(50, temperature=3.0, top_k=4))
    assert len(set(tokens)) > 1
    np.testing.assert_allclose(logprobs, LOGITS.log_softmax(-1)[tokens], rtol=1e-6)


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(15, 50, generator=generator)
    filters: list[dict[str, float]] = [
        {},
        {"top_p": 0.7},
        {"top_k": 9},
        {"top_k": 9, "top_p": 0.6},
        {"temperature": 0.0},
    ]
    mixed = [
        draw for number in range(3) for params in filters for draw in draws(3, **params)[number : number + 1]
    ]
    tokens, logprobs = choose(logits, mixed)
    for row, draw in enumerate(mixed):
        assert choose(logits[row : row + 1], [draw]) == ([tokens[row]], [logprobs[row]])


def test_random_numbers_are_uniform_and_differ_by_every_key() -> None:
    numbers = np.array([uniform(s, n, p) for s in range(10) for n in range(10) for p in range(100)])
    assert len(set(numbers.tolist())) == len(numbers)
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-square, 19 degrees, p = 0.0007
    assert uniform(-3, 0, 0) != uniform(3, 0, 0)
    assert uniform(2**70 + 1, 0, 0) == uniform(2**70 + 1, 0, 0)


def test_tokens_without_mass_are_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), float("-inf")]]).expand(500, -1).clone()
    tokens, _ = choose(logits, draws(500))
    assert set(tokens) == {1}


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("bad", [[math.nan] * 6, [0.0, math.inf, 1.0, 2.0, 3.0, 4.0], [-math.inf] * 6])
def test_a_row_that_is_not_finite_gives_a_token_without_a_logprob(
    params: dict[str, float], bad: list[float]
) -> None:
    """The device must not be asked for a token outside the vocabulary: a CUDA device would not survive it."""
    logits = torch.stack([torch.tensor(bad), LOGITS])
    tokens, logprobs = choose(logits, [draws(1, **params)[0]] * 2)
    assert 0 <= tokens[0] < len(LOGITS)
    assert not math.isfinite(logprobs[0])
    assert (tokens[1:], logprobs[1:]) == choose(logits[1:], draws(1, **params))


def test_the_smallest_temperatures_take_the_likeliest_of_large_logits_too() -> None:
    logits = (LOGITS * 1e20).expand(4, -1).clone()
    for temperature in (1e-20, 1e-40, 1e-300):
        assert choose(logits, draws(4, temperature=temperature))[0] == [0] * 4
