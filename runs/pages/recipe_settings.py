"""A recipe's settings as a table: what it was started with, what rules decided, what steering changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runs.models import Recipe

# In the order of the page; what is named nowhere comes last.
_TRAINING: Final = (
    "num_steps",
    "num_epochs",
    "batch_size",
    "batch_tokens",
    "learning_rate",
    "schedule",
    "warmup_share",
    "weight_decay",
    "grad_clip_norm",
)
GROUPS: Final = (
    ("Model and data", ("recipe", "base_model", "lora", "dataset", "train_on", "max_length", "seed")),
    ("Training", _TRAINING),
    (
        "Validation and checkpoints",
        ("validation", "eval_every", "early_stopping", "save_every", "keep_checkpoints"),
    ),
    ("Samples", ("samples",)),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value under its name in the YAML file; `was` is what it had at the start if steering changed it."""

    name: str
    values: list[str]
    is_changed: bool
    is_by_rule: bool
    was: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Settings that belong together."""

    title: str
    settings: list[Setting]


def groups_of(recipe: Recipe) -> list[Group]:
    """Return all settings of the recipe in groups."""
    started = dict(_leaves(recipe.started_config))
    named = {name for _, names in GROUPS for name in names}
    others = tuple(name for name in recipe.config if name not in named)
    groups = [
        Group(title=title, settings=_settings(recipe.config, started, names))
        for title, names in (*GROUPS, ("Other", others))
    ]
    return [group for group in groups if group.settings]


def num_changed(groups: Sequence[Group]) -> int:
    """Return how many settings steering has changed."""
    return sum(setting.is_changed for group in groups for setting in group.settings)


def _settings(config: Mapping[str, Any], started: Mapping[str, Any], names: Sequence[str]) -> list[Setting]:
    chosen = {name: config[name] for name in names if name in config}
    return [_setting(name, value, started.get(name)) for name, value in _leaves(chosen)]


def _setting(name: str, value: Any, was: Any) -> Setting:
    # A value that was open at the start was decided by a rule when the dataset was read.
    is_changed = was is not None and value != was and not (name == "num_epochs" and value is None)
    return Setting(
        name=name,
        values=[_shown(one) for one in value] if isinstance(value, list) else [_shown(value)],
        is_changed=is_changed,
        is_by_rule=was is None and value is not None,
        was=_shown(was) if is_changed else "",
    )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(_shown(one) for one in value) or "none"
    return str(value)
