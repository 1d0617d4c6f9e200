from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import LossFunctionError
from gpuworker.engine.losses import LOSSES, bind
from gpuworker.engine.types import Datum, ForwardBackward, ForwardBackwardResult, LoraSpec

from .conftest import load_reference, random_tokens
from .reference import assert_close, make_adapter, peft_logprobs, peft_model

P = [-1.0, -0.5, -2.0, -0.1, -3.0]
Q = [-1.5, -0.4, -1.0, -0.9, -3.0]
A = [1.0, -2.0, 0.5, -1.0, 0.0]
W = [1.0, 0.5, 0.0, 2.0, 1.0]


def by_hand(name: str, p: float, q: float, a: float, **config: float) -> tuple[float, float]:
    """Return the loss term and its derivative by p, written out case by case."""
    r = float(np.exp(p - q))
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    if name == "importance_sampling":
        return -r * a, -r * a
    if name == "ppo":
        is_clipped = (a > 0 and r > high) or (a < 0 and r < low)
        bound = high if r > high else low
        return (-bound * a, 0.0) if is_clipped else (-r * a, -r * a)
    if name == "cispo":
        kept = low if r < low else high if r > high else r
        return -kept * p * a, -kept * a
    assert name == "dro"
    beta = config.get("beta", 0.05)
    return -(p * a - beta / 2 * (p - q) ** 2), -(a - beta * (p - q))


CASES = [
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}),
    ("cispo", {}),
    ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 1.5}),
    ("dro", {}),
    ("dro", {"beta": 0.7}),
]


@pytest.mark.parametrize(("name", "config"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_match_the_formula(name: str, config: dict[str, float], weighted: bool) -> None:
    leaf = torch.tensor(P, dtype=torch.float64, requires_grad=True)
    inputs = {
        "logprobs": torch.tensor(Q, dtype=torch.float64),
        "advantages": torch.tensor(A, dtype=torch.float64),
    }
    if weighted:
        inputs["weights"] = torch.tensor(W, dtype=torch.float64)
    terms = bind(name, config).terms(leaf, inputs)
    terms.sum().backward()
    expected = [by_hand(name, p, q, a, **config) for p, q, a in zip(P, Q, A, strict=True)]
    scale = np.array(W if weighted else [1.0] * len(P))
    np.testing.assert_allclose(
        terms.detach(), np.array([e[0] for e in expected]) * scale, rtol=1e-12, atol=1e-15
    )
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad, np.array([e[1] for e in expected]) * scale, rtol=1e-12, atol=1e-15)


def test_the_cases_reach_both_sides_of_the_clip() -> None:
    ratios = np.exp(np.array(P) - np.array(Q))
    assert ((ratios > 1.2) & (np.array(A) > 0)).any()
    assert ((ratios > 1.2) & (np.array(A) < 0)).any()
    assert (ratios < 0.8).any()


def test_cross_entropy_is_the_weighted_sum() -> None:
    leaf = torch.tensor(P, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0])
    bind("cross_entropy", {}).terms(leaf, {"weights": weights}).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, -weights)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_through_the_engine_match_peft(
    name: str, engine: Engine, model_directory: Callable[[str], Path]
) -> None:
    state = make_adapter(engine, f"loss-{name}", LoraSpec(rank=4, seed=21))
    rng = np.random.default_rng(3)
    tokens = random_tokens(rng, 31)
    datum = Datum(tokens=tokens[:-1], target_tokens=tokens[1:], inputs={})
    model = peft_model(load_reference(model_directory("qwen3")), state)
    logprobs = peft_logprobs(model, datum)
    near = logprobs.detach().numpy() + rng.normal(scale=0.4, size=30)
    advantages = rng.normal(size=30) * (rng.random(30) < 0.7)
    inputs = {
        "logprobs": near.astype(np.float32),
        "advantages": advantages.astype(np.float32),
        "weights": (rng.random(30) < 0.8).astype(np.float32),
    }
    if name == "cross_entropy":
        inputs = {"weights": rng.normal(size=30).astype(np.float32)}
    datum = replace(datum, inputs=inputs | {"mask": np.zeros(30, dtype=np.float32)})
    job = ForwardBackward(adapter_id=f"loss-{name}", data=(datum,), loss_fn=name)
    (result,) = engine.forward_backward([job])
    assert isinstance(result, ForwardBackwardResult)
    terms = bind(name, {}).terms(logprobs, {key: torch.from_numpy(value) for key, value in inputs.items()})
    terms.sum().backward()
    assert result.metrics["loss:sum"] == pytest.approx(terms.sum().item(), rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(result.logprobs[0], logprobs.detach(), atol=3e-5, rtol=0)
    gradient = engine.export_state(f"loss-{name}", optimizer=False, gradients=True).gradient
    assert gradient is not None
    for module, pair in state.layout.views(gradient).items():
        layer = model.base_model.model.get_submodule(module)
        assert_close(pair.a, layer.lora_A["default"].weight.grad)
        assert_close(pair.b, layer.lora_B["default"].weight.grad)


def test_positions_without_loss_are_left_out() -> None:
    """An infinite sampler log-probability on a prompt token must not make the loss infinite."""
    loss = bind("importance_sampling", {})
    inputs = {
        "logprobs": np.array([[np.inf], [1.0]], dtype=np.float32),
        "advantages": np.array([[0.0], [1.0]], dtype=np.float32),
    }
    np.testing.assert_array_equal(loss.trained(inputs, (2, 1)), [[False], [True]])
    # dro pulls towards q even where the advantage is zero
    np.testing.assert_array_equal(bind("dro", {}).trained(inputs, (2, 1)), [[True], [True]])


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("stable_reinforce", {}, "use one of cross_entropy"),
        ("ppo", {"beta": 0.1}, "clip_low_threshold, clip_high_threshold"),
        ("cross_entropy", {"beta": 0.1}, "allowed: none"),
        ("dro", {"beta": float("nan")}, "finite"),
        ("cispo", {"clip_low_threshold": 2.0}, "above"),
    ],
)
def test_it_rejects_names_and_config(name: str, config: dict[str, float], message: str) -> None:
    with pytest.raises(LossFunctionError, match=message):
        bind(name, config)
