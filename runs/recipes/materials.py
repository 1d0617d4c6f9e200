"""Get recipes' data ready in threads, so that tokenising one dataset holds up no other run.

What is in the cache is opened beside what has to be tokenised first. A run whose base model no worker has
loaded yet takes no thread: it is looked at again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from django.db import connections

from runs.exceptions import MintError
from runs.models import DatasetVersion, Recipe
from runs.recipes import defaults, labels, tokens
from runs.recipes.batches import BatchPlan, Mix, by_content, by_seed, some_of, split
from runs.recipes.sft import HeldOut, Material
from runs.recipes.tokens import TokenStore
from runs.schemas.recipes import SftConfig
from runs.services import base_models, recipe_steps
from runs.services.data_starts import DataStart
from runs.services.recipe_rows import State

_NUM_OPENING: Final = 2
_NUM_TOKENISING: Final = 2
_NEED_DATA: Final = (State.PREPARING, State.QUEUED, State.RUNNING)
_PROGRESS_S: Final = 0.5
_StoreOf = Callable[[DatasetVersion, SftConfig], TokenStore]


class DataError(MintError):
    """nothing in this dataset can be trained on"""


class _NotCached(Exception):
    """Not all of a recipe's data is in the cache."""


class _NoLongerNeeded(Exception):
    """The run was stopped while its data was being made ready."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One recipe's data on its way; `made` says what is tokenised for it, None while it is looked for in the cache."""

    future: Future[Material | None]
    progress: _Progress
    made: tuple[object, ...] | None


class Materials:
    """The data of the recipes that the loop looks after, by recipe."""

    def __init__(self) -> None:
        self._opening = ThreadPoolExecutor(_NUM_OPENING, thread_name_prefix="opening")
        self._tokenising = ThreadPoolExecutor(_NUM_TOKENISING, thread_name_prefix="tokenising")
        self._readings: dict[int, _Reading] = {}

    def get(self, recipe: Recipe) -> Material | None:
        """Return the recipe's data, or None while it is not there yet; after an error the next call begins anew.

        Raises:
            BaseModelAway: the base model has no use just now.
            MintError: the data cannot be used; the message is for the person.
            OSError: a file cannot be read or written.
        """
        reading = self._readings.get(recipe.pk)
        if reading is None:
            self._open(recipe)
        elif reading.future.done():
            return self._result(recipe, reading)
        return None

    def keep_only(self, recipes: list[Recipe]) -> None:
        """Let go of the data of every other recipe, and of those that need none in their state."""
        wanted = {recipe.pk for recipe in recipes if recipe.state in _NEED_DATA}
        for pk in [pk for pk in self._readings if pk not in wanted]:
            reading = self._readings.pop(pk)
            reading.progress.is_over.set()
            reading.future.cancel()

    def _result(self, recipe: Recipe, reading: _Reading) -> Material | None:
        if reading.future.exception() is not None:
            del self._readings[recipe.pk]
        material = reading.future.result()
        if material is None:
            self._tokenise(recipe)
        return material

    def _open(self, recipe: Recipe) -> None:
        """Look into the cache, unless the data cannot be there: until the model is loaded, or its tokens are made."""
        is_loaded = base_models.get(recipe.config["base_model"]).is_loaded
        if is_loaded and not self._is_being_made(recipe):
            self._begin(recipe, self._opening, _opened, made=None)

    def _tokenise(self, recipe: Recipe) -> None:
        """Have the data made; recipes that train on the same take one thread together."""
        if self._is_being_made(recipe):
            del self._readings[recipe.pk]
        else:
            self._begin(recipe, self._tokenising, _made, made=_trained_on(recipe))

    def _is_being_made(self, recipe: Recipe) -> bool:
        wanted = _trained_on(recipe)
        return any(one.made == wanted and not one.future.done() for one in self._readings.values())

    def _begin(
        self,
        recipe: Recipe,
        pool: ThreadPoolExecutor,
        read: Callable[[Recipe, _Progress], Material | None],
        *,
        made: tuple[object, ...] | None,
    ) -> None:
        progress = _Progress(recipe)
        future = pool.submit(_in_thread, read, recipe, progress)
        self._readings[recipe.pk] = _Reading(future=future, progress=progress, made=made)


def summary_of(material: Material) -> dict[str, Any]:
    """Return what a person is told of the data: rows and tokens of each part."""
    store = material.store
    return {
        "num_rows": len(store),
        "num_train_rows": len(material.rows),
        "num_validation_rows": sum(len(one.rows) for one in material.held_out),
        "num_untrained_rows": store.counts.num_untrained_rows,
        "num_truncated_rows": store.counts.num_truncated_rows,
        "num_failed_rows": store.counts.num_failed_rows,
        "num_train_tokens": int(store.lengths[material.rows].sum()),
        "num_trained_tokens": int(store.num_trained[material.rows].sum()),
    }


def _in_thread(
    read: Callable[[Recipe, _Progress], Material | None], recipe: Recipe, progress: _Progress
) -> Material | None:
    try:
        return read(recipe, progress)
    finally:
        connections.close_all()


def _trained_on(recipe: Recipe) -> tuple[object, ...]:
    """Return what two recipes share only if they train on the same tokens."""
    names = ("base_model", "train_on", "max_length")
    return (recipe.dataset_version_id, *(recipe.config[name] for name in names))


def _opened(recipe: Recipe, progress: _Progress) -> Material | None:
    """Return the recipe's data if all of it is in the cache."""
    try:
        return _read(recipe, progress, _cached)
    except _NotCached:
        return None


def _made(recipe: Recipe, progress: _Progress) -> Material:
    """Return the recipe's data, tokenised now where it is not in the cache; seconds to minutes."""
    return _read(recipe, progress, partial(_prepared, progress))


def _read(recipe: Recipe, progress: _Progress, store_of: _StoreOf) -> Material:
    """Read the recipe's datasets as tokens and divide them."""
    config = SftConfig.model_validate(recipe.config)
    store = store_of(recipe.dataset_version, config)
    rows, held_out_rows = split(store.num_trained, config.validation, _mix_of(recipe, store))
    if len(rows) == 0:
        raise DataError(
            f"none of the {len(store)} rows has a token to train on; choose another train_on or a longer max_length",
            place="dataset",
        )
    held_out = [HeldOut(label=labels.SPLIT, store=store, rows=held_out_rows)] if len(held_out_rows) else []
    held_out += _others(recipe, config, store_of, has_split=bool(held_out))
    plan = BatchPlan(
        rows,
        store.lengths,
        seed=config.seed,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        start=DataStart(step=recipe.data_step, row=recipe.data_row),
        on_epoch=progress.stop_if_over,
    )
    _find_batches(plan, recipe, config)
    return Material(store=store, rows=rows, plan=plan, held_out=held_out)


def _find_batches(plan: BatchPlan, recipe: Recipe, config: SftConfig) -> None:
    """Find what the loop is going to ask for: the end of a run that has none yet, and where the next step begins."""
    if config.num_steps is None:
        plan.num_steps(config.num_epochs or defaults.NUM_EPOCHS)
    plan.start_of(recipe.next_step)


def _cached(version: DatasetVersion, config: SftConfig) -> TokenStore:
    store = tokens.open_store(
        version, config.base_model, train_on=config.train_on, max_length=_max_length(config)
    )
    if store is None:
        raise _NotCached
    return store


def _prepared(progress: _Progress, version: DatasetVersion, config: SftConfig) -> TokenStore:
    return tokens.prepare(
        version,
        config.base_model,
        train_on=config.train_on,
        max_length=_max_length(config),
        progress=progress.enter,
    )


def _max_length(config: SftConfig) -> int:
    return config.max_length or defaults.max_length(base_models.get(config.base_model))


def _others(recipe: Recipe, config: SftConfig, store_of: _StoreOf, *, has_split: bool) -> list[HeldOut]:
    """Return the datasets given for validation, of large ones a part; those without a trained token are left out."""
    found = []
    for version in recipe.validation_versions.select_related("dataset"):
        store = store_of(version, config)
        rows = some_of(store.num_trained, _mix_of(recipe, store), max_rows=config.validation.max_rows)
        if len(rows):
            found.append((version, store, rows))
    names = labels.labels_of([version for version, _, _ in found], has_split=has_split)
    return [HeldOut(label=names[version.pk], store=store, rows=rows) for version, store, rows in found]


def _mix_of(recipe: Recipe, store: TokenStore) -> Mix:
    if recipe.held_out_by == Recipe.HeldOutBy.SEED:
        return partial(by_seed, seed=recipe.config["seed"])
    return partial(by_content, digests=store.digests)


class _Progress:
    """Enters how far the reading is, now and then, and ends it once `is_over` is set."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._next_at = 0.0
        self.is_over = threading.Event()

    def stop_if_over(self) -> None:
        if self.is_over.is_set():
            raise _NoLongerNeeded

    def enter(self, share: float) -> None:
        self.stop_if_over()
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _PROGRESS_S
            recipe_steps.enter_progress(self._recipe, share)
