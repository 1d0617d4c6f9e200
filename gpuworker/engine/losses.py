"""The loss functions: pure functions of target log-probabilities, elementwise, always summed.

Each takes (logprobs, inputs, config) of equal shape and returns the loss terms, whose sum is the
loss; autograd gives the gradient. Called by logprobs on trained positions only.
Notation: p log-probability now, q that of the sampler (`logprobs`), A `advantages`, w `weights`.
Source: the formulas that the SDK documents for its loss_fn names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpuworker.engine.exceptions import LossFunctionError
from gpuworker.engine.types import Float32Array

Terms: TypeAlias = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float]], Tensor]

_INPUT_NAMES = ("weights", "logprobs", "advantages", "clip_low_threshold", "clip_high_threshold")
"""Names that mean something to some loss; a tensor of any other name is left alone."""


def cross_entropy(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """Return -w * p. Weights may be negative: custom losses send the gradient that way."""
    return -inputs["weights"] * logprobs


def importance_sampling(
    logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
) -> Tensor:
    """Return -r * A with the ratio r = exp(p - q)."""
    return -torch.exp(logprobs - inputs["logprobs"]) * inputs["advantages"]


def ppo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """Return -min(r * A, clip(r) * A); the thresholds bound the ratio itself."""
    ratio, advantages = torch.exp(logprobs - inputs["logprobs"]), inputs["advantages"]
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * advantages, clipped * advantages)


def cispo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """Return -clip(r) * p * A with no gradient through the clipped ratio."""
    ratio = torch.exp(logprobs.detach() - inputs["logprobs"])
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -clipped * logprobs * inputs["advantages"]


def dro(logprobs: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """Return -(p * A - beta / 2 * (p - q)^2)."""
    distance = logprobs - inputs["logprobs"]
    return 0.5 * config["beta"] * distance.square() - logprobs * inputs["advantages"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss: its terms, the tensors it takes and its config with defaults.

    `zero_without` names the tensor whose zeros make the term and its gradient vanish.
    """

    terms: Terms
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)
    zero_without: str | None


_RATIO_INPUTS = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(terms=cross_entropy, required=("weights",), zero_without="weights"),
    "importance_sampling": Loss(
        terms=importance_sampling, required=_RATIO_INPUTS, optional=("weights",), zero_without="advantages"
    ),
    "ppo": Loss(
        terms=ppo,
        required=_RATIO_INPUTS,
        optional=("weights",),
        defaults=_CLIP,
        zero_without="advantages",
    ),
    "cispo": Loss(
        terms=cispo,
        required=_RATIO_INPUTS,
        optional=("weights",),
        defaults=_CLIP,
        zero_without="advantages",
    ),
    "dro": Loss(
        terms=dro,
        required=_RATIO_INPUTS,
        optional=("weights",),
        defaults={"beta": 0.05},
        zero_without=None,
    ),
}


@dataclass(frozen=True)
class BoundLoss:
    """A loss with its config filled in, as one job uses it."""

    name: str
    loss: Loss
    config: Mapping[str, float]

    def terms(self, logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss terms of some trained positions, shaped like `logprobs`."""
        terms = self.loss.terms(logprobs, inputs, self.config)
        if "weights" in self.loss.optional and "weights" in inputs:
            terms = terms * inputs["weights"]
        return terms

    def select_inputs(self, inputs: Mapping[str, Float32Array]) -> dict[str, Float32Array]:
        """Return the tensors this loss takes out of those a datum brings.

        Raises:
            LossFunctionError: one is missing, or one belongs to another loss.
        """
        loss = self.loss
        allowed = (*loss.required, *loss.optional)
        for name in loss.required:
            if name not in inputs:
                raise LossFunctionError(f"{self.name} needs {', '.join(loss.required)}: {name} is missing")
        for name in inputs:
            if name in _INPUT_NAMES and name not in allowed:
                raise LossFunctionError(f"{self.name} does not take {name}; it takes {', '.join(allowed)}")
        return {name: inputs[name] for name in allowed if name in inputs}

    def trained(self, inputs: Mapping[str, Float32Array], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Return which positions can carry loss; the others need their log-probability only."""
        mask = np.ones(shape, dtype=np.bool_)
        for name in {self.loss.zero_without, "weights"}:
            if name is not None and name in inputs:
                mask &= inputs[name] != 0
        return mask


def bind(name: str, config: Mapping[str, float]) -> BoundLoss:
    """Return the named loss with `config` over its defaults.

    Raises:
        LossFunctionError: an unknown name, an unknown key or a value that is no usable number.
    """
    if name not in LOSSES:
        raise LossFunctionError(f"loss_fn {name!r} is unknown; use one of {', '.join(LOSSES)}")
    loss = LOSSES[name]
    for key, value in config.items():
        if key not in loss.defaults:
            allowed = ", ".join(loss.defaults) or "none"
            raise LossFunctionError(f"{name} has no config key {key!r}; allowed: {allowed}")
        if not math.isfinite(value):
            raise LossFunctionError(f"{name}: {key} must be a finite number, not {value!r}")
    full = {**loss.defaults, **{key: float(value) for key, value in config.items()}}
    if "clip_low_threshold" in full and full["clip_low_threshold"] > full["clip_high_threshold"]:
        raise LossFunctionError(f"{name}: clip_low_threshold is above clip_high_threshold")
    return BoundLoss(name, loss, full)
