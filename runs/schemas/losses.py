"""What each loss function reads from the wire: its tensors, its config keys and their ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from runs.exceptions import RequestInvalid
from runs.schemas.problems import place_of, show

TARGET_TOKENS = "target_tokens"


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """`required` and `optional` are float32 tensors beside target_tokens, each of its shape.

    `multi_target`: target_tokens may be (N, K). `negative_weights`: custom losses send
    weights = -dC/dlogprobs through cross_entropy, so they may have any sign there.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config_keys: tuple[str, ...] = ()
    multi_target: bool = False
    negative_weights: bool = False


_RL_INPUTS = ("logprobs", "advantages")
_CLIP_KEYS = ("clip_low_threshold", "clip_high_threshold")

LOSSES: dict[str, LossSpec] = {
    "cross_entropy": LossSpec(required=("weights",), multi_target=True, negative_weights=True),
    "importance_sampling": LossSpec(required=_RL_INPUTS, optional=("weights",)),
    "ppo": LossSpec(required=_RL_INPUTS, optional=("weights",), config_keys=_CLIP_KEYS),
    "cispo": LossSpec(required=_RL_INPUTS, optional=("weights",), config_keys=_CLIP_KEYS),
    "dro": LossSpec(required=_RL_INPUTS, optional=("weights",), config_keys=("beta",)),
}

KNOWN_UNSUPPORTED = ("gspo", "stable_reinforce", "custom")
# Tensors that would change the loss if they were read; other extra names (`mask`) are left unread.
UNSUPPORTED_TENSORS = (*_CLIP_KEYS, "sequence_ratio_mask")


def loss_spec(loss_fn: str) -> LossSpec:
    """Return what the loss function reads.

    Raises:
        RequestInvalid: it is unknown, or known and not supported.
    """
    spec = LOSSES.get(loss_fn)
    if spec is None:
        what = "is not supported by this server" if loss_fn in KNOWN_UNSUPPORTED else "is unknown"
        raise RequestInvalid(
            f"the loss function {show(loss_fn)} {what}; use one of {', '.join(LOSSES)}", place="loss_fn"
        )
    return spec


def check_config(config: Mapping[str, object], loss_fn: str) -> dict[str, float]:
    """Return the loss function's config as floats, only of keys that it knows.

    Raises:
        RequestInvalid: an unknown key, a value that is not a finite number, or out of range.
    """
    keys = loss_spec(loss_fn).config_keys
    checked: dict[str, float] = {}
    for name, value in config.items():
        place = place_of(("loss_fn_config", name))
        if name not in keys:
            allowed = f"it takes {', '.join(keys)}" if keys else "it takes none"
            raise RequestInvalid(f"{loss_fn} has no such setting; {allowed}", place=place)
        checked[name] = _non_negative(value, place)
    low, high = (checked.get(key) for key in _CLIP_KEYS)
    if low is not None and high is not None and low > high:
        raise RequestInvalid(
            f"clip_low_threshold {low} is above clip_high_threshold {high}", place="loss_fn_config"
        )
    return checked


def _non_negative(value: object, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestInvalid(f"must be a number, got {show(value)}", place=place)
    if not math.isfinite(value) or value < 0:
        raise RequestInvalid(f"must be finite and at least 0, got {show(value)}", place=place)
    return float(value)
