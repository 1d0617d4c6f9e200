"""The rules behind settings that a person leaves open, each with its reason."""

from __future__ import annotations

import math
from typing import Final

from runs.schemas.recipes import Changes, SampleSettings, SftConfig
from runs.services import base_models
from runs.services.base_models import BaseModelInfo

NUM_EPOCHS: Final = 3.0
MAX_LENGTH: Final = 4096
# How often a run looks at itself: ten times, as often as a chart needs to show a turn.
NUM_LOOKS: Final = 10
_REFERENCE_RATE: Final = 4e-4
_REFERENCE_PARAMETERS: Final = 1e9
_EXPONENT: Final = 0.2
_LOWEST_RATE, _HIGHEST_RATE = 5e-5, 2e-3


def learning_rate(info: BaseModelInfo, rank: int) -> float:
    """Return the peak learning rate for LoRA on a base model, to two digits.

    The rate falls slowly with the model's size: 4e-4 at a billion parameters, divided by 1.6 for each
    tenfold, between 5e-5 and 2e-3. The rank does not enter: an adapter's product is scaled by alpha / rank,
    which makes the best rate nearly the same for every rank.

    Source: Schulman et al., "LoRA Without Regret" (2025): best LoRA rates about ten times those of full
    fine-tuning, independent of rank under 1 / rank scaling. The two constants are ours.
    """
    size = max(info.num_parameters, 1_000_000)
    rate = _REFERENCE_RATE * (_REFERENCE_PARAMETERS / size) ** _EXPONENT
    return _two_digits(min(max(rate, _LOWEST_RATE), _HIGHEST_RATE))


def max_length(info: BaseModelInfo) -> int:
    """Return where rows are cut: the context length, or 4096 tokens of a longer one."""
    return min(info.max_context or MAX_LENGTH, MAX_LENGTH)


def completed(config: SftConfig, *, info: BaseModelInfo, num_steps: int) -> SftConfig:
    """Return the settings with every open value decided.

    Args:
        num_steps: what `num_epochs` comes to with the dataset at hand.
    """
    look = max(1, math.ceil(num_steps / NUM_LOOKS))
    samples = config.samples
    eval_every = config.eval_every or look
    values = {
        "num_epochs": None,
        "num_steps": num_steps,
        "learning_rate": config.learning_rate or learning_rate(info, config.lora.rank),
        "max_length": config.max_length or max_length(info),
        "eval_every": eval_every,
        "save_every": config.save_every or eval_every,
        "samples": samples.model_copy(update={"every": samples.every or eval_every}),
    }
    return config.model_copy(update=values)


def decided(changes: Changes, held: SftConfig) -> Changes:
    """Return changes to the settings of a run whose data is read, null replaced by what the rules make of it.

    What no rule decides stays null.

    Raises:
        RequestInvalid: the base model, which the rules ask about, is not offered any more.
    """
    names = {"learning_rate", "eval_every", "save_every"} & changes.model_fields_set
    asked = {name: getattr(changes, name) for name in names}
    reset = [name for name, value in asked.items() if value is None]
    if not reset:
        return changes
    whole = completed(
        held.model_copy(update=asked),
        info=base_models.get(held.base_model),
        num_steps=changes.num_steps or held.num_steps or 1,
    )
    return changes.model_copy(update={name: getattr(whole, name) for name in reset})


def samples_every(samples: SampleSettings, config: SftConfig) -> int:
    """Return after how many steps the fixed prompts are answered again; settings of a started run."""
    return samples.every or config.eval_every or config.num_steps or 1


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
