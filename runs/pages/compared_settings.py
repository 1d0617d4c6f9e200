"""The settings of several runs side by side: a row each, with what differs marked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from runs.models import Recipe, TrainingRun
from runs.pages import recipe_settings
from runs.pages.comparison import query_of
from runs.services import run_rows
from runs.templatetags.formats import count

MAX_CHARS: Final = 400
_RUN: Final = "Run"
_ADAPTER: Final = "Model and adapter"
_DATA: Final = "Recipe and data"
_METADATA: Final = "Metadata"
_TITLES: Final = {"Model and data": _DATA}
# Rows of a recipe's settings that every run has by another name.
_SAID_OF_ALL: Final = ("base_model", "dataset")
# A group and a name in it.
Place: TypeAlias = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Value:
    """A setting of one run; values differ where their `key` does."""

    key: str
    text: str
    note: str = ""
    is_known: bool = True


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What the table shows of a setting of one run; `differs` from the first run of which it is known."""

    text: str
    note: str
    is_known: bool
    differs: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """A setting of all runs; a line may break between the parts of its name.

    `ordered` is the query of the page with the runs in the order of this setting, empty where they are all alike.
    """

    name: str
    parts: list[str]
    cells: list[Cell]
    is_same: bool
    ordered: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Settings that belong together."""

    title: str
    rows: list[Row]
    is_same: bool


# Of a run that its own program trains mintweb knows no recipe, which makes it no other one.
_UNKNOWN: Final = Value(key="", text="unknown", is_known=False)
_NOT_SET: Final = Value(key="\0", text="not set")


def groups_of(runs: Sequence[TrainingRun]) -> list[Group]:
    """Return all settings of runs from `comparisons.chosen`, in groups."""
    settings = [dict(_values_of(run)) for run in runs]
    titles = dict.fromkeys(title for values in settings for title, _ in values)
    groups = [
        Group(title=title, rows=rows, is_same=all(row.is_same for row in rows))
        for title in titles
        if (rows := list(_rows(title, runs, settings)))
    ]
    return sorted(groups, key=lambda group: group.title == _METADATA)


def _rows(
    title: str, runs: Sequence[TrainingRun], settings: Sequence[Mapping[Place, Value]]
) -> Iterator[Row]:
    names = dict.fromkeys(name for values in settings for other, name in values if other == title)
    is_of_all = title in (_RUN, _ADAPTER, _METADATA)
    others = [_NOT_SET if is_of_all or _recipe_of(run) else _UNKNOWN for run in runs]
    for name in names:
        pairs = zip(settings, others, strict=True)
        yield _row(name, runs, [values.get((title, name), other) for values, other in pairs])


def _row(name: str, runs: Sequence[TrainingRun], values: Sequence[Value]) -> Row:
    first = next(value.key for value in values if value.is_known)
    cells = [
        Cell(
            text=value.text,
            note=value.note,
            is_known=value.is_known,
            differs=value.is_known and value.key != first,
        )
        for value in values
    ]
    parts = re.findall(r"[^_.]*[_.]?", name)[:-1]
    is_same = not any(cell.differs for cell in cells)
    ordered = "" if is_same else query_of([runs[place].public_id for place in _order(values)])
    return Row(name=name, parts=parts, cells=cells, is_same=is_same, ordered=ordered)


def _order(values: Sequence[Value]) -> list[int]:
    """Return the places of values from small to large, or the other way where they stand so already.

    Without a value comes last.
    """
    with_value = [place for place, value in enumerate(values) if value.is_known and value is not _NOT_SET]
    without = [place for place in range(len(values)) if place not in with_value]
    rising = sorted(with_value, key=lambda place: _rank(values[place]))
    if rising + without != list(range(len(values))):
        return rising + without
    return sorted(with_value, key=lambda place: _rank(values[place]), reverse=True) + without


def _rank(value: Value) -> tuple[bool, float, str]:
    try:
        number = float(value.text)
    except ValueError:
        number = math.nan
    is_number = math.isfinite(number)
    return not is_number, number if is_number else 0.0, value.text.casefold()


def _values_of(run: TrainingRun) -> Iterator[tuple[Place, Value]]:
    """Yield the run's settings in the order of the table."""
    yield (_RUN, "Source"), _plain(TrainingRun.Source(run.source).label)
    yield (_RUN, "SDK version"), _plain(run.session.sdk_version or "none")
    yield (_RUN, "Forked from"), _parent_of(run)
    yield (_ADAPTER, "Base model"), _plain(run.base_model)
    yield (_ADAPTER, "LoRA rank"), _plain(str(run.lora_rank))
    yield (_ADAPTER, "LoRA alpha"), _plain(f"{run.lora_alpha:g}")
    yield (_ADAPTER, "Trained parts"), _plain(run_rows.parts_of(run))
    yield (_ADAPTER, "LoRA seed"), _plain(str(run.lora_seed))
    if recipe := _recipe_of(run):
        yield from _of_recipe(recipe)
    for name, value in run.user_metadata.items():
        yield (_METADATA, str(name)), _plain(str(value))


def _of_recipe(recipe: Recipe) -> Iterator[tuple[Place, Value]]:
    version = recipe.dataset_version
    name = f"{version.dataset.name}, version {version.number}"
    yield (_DATA, "dataset"), Value(key=str(version.pk), text=_short(name))
    for group in recipe_settings.groups_of(recipe):
        for setting in group.settings:
            if setting.name in _SAID_OF_ALL or setting.name.startswith("lora."):
                continue
            text = "\n".join(setting.values) or "none"
            note = f"was {_short(setting.was)} at the start" if setting.is_changed else ""
            value = Value(key=f"{text}\0{setting.was}", text=_short(text), note=note)
            yield (_TITLES.get(group.title, group.title), setting.name), value


def _recipe_of(run: TrainingRun) -> Recipe | None:
    recipe: Recipe | None = getattr(run, "recipe", None)
    return recipe


def _parent_of(run: TrainingRun) -> Value:
    if not run.parent_path:
        return _plain("nothing")
    parent = run.parent if run.parent is not None and run.parent.owner_id == run.owner_id else None
    title = run.parent_path if parent is None else run_rows.title_of(parent)
    kind = "with optimizer" if run.continues_parent else "weights only"
    text = f"{title} at step {count(run.parent_step or 0)}"
    return Value(key=f"{run.parent_path} {kind}", text=_short(text), note=kind)


def _plain(text: str) -> Value:
    return Value(key=text, text=_short(text))


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}\u2026"
