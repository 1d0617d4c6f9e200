"""Get a recipe's data ready in a thread of its own, so that tokenising one dataset holds up no other run."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from django.db import connections

from runs.exceptions import MintError
from runs.models import DatasetVersion, Recipe
from runs.recipes import defaults, tokens
from runs.recipes.batches import BatchPlan, some_of, split
from runs.recipes.sft import HeldOut, Material
from runs.recipes.tokens import TokenStore
from runs.schemas.recipes import SftConfig
from runs.services import base_models, recipe_steps
from runs.services.base_models import BaseModelInfo

_PROGRESS_S: Final = 0.5
_MAX_LABEL: Final = 40


class DataError(MintError):
    """nothing in this dataset can be trained on"""


class Materials:
    """The data of the recipes that the loop looks after, by recipe."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="materials")
        self._futures: dict[int, Future[Material]] = {}

    def get(self, recipe: Recipe) -> Material | None:
        """Return the recipe's data, or None while it is being read.

        Raises:
            MintError: the data cannot be used; the message is for the person.
            OSError: a file cannot be read or written.
        """
        future = self._futures.get(recipe.pk)
        if future is None:
            future = self._futures[recipe.pk] = self._pool.submit(_in_thread, recipe)
        return future.result() if future.done() else None

    def forget_failed(self, recipe: Recipe) -> None:
        """Let data that could not be read be read again."""
        future = self._futures.get(recipe.pk)
        if future is not None and future.done() and future.exception() is not None:
            del self._futures[recipe.pk]

    def keep_only(self, recipes: list[Recipe]) -> None:
        """Let go of the data of every other recipe."""
        wanted = {recipe.pk for recipe in recipes}
        for pk in [pk for pk in self._futures if pk not in wanted]:
            del self._futures[pk]

    def wait(self, recipe: Recipe) -> None:
        """Wait until the recipe's data is ready or cannot be."""
        if self.get(recipe) is None:
            self._futures[recipe.pk].exception()


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


def _in_thread(recipe: Recipe) -> Material:
    try:
        return load(recipe)
    finally:
        connections.close_all()


def load(recipe: Recipe) -> Material:
    """Read the recipe's datasets as tokens and divide them; seconds to minutes the first time."""
    config = SftConfig.model_validate(recipe.config)
    info = _when_loaded(config.base_model)
    progress = _Progress(recipe)
    store = _store(recipe.dataset_version, config, info, progress)
    rows, held_out_rows = split(store.num_trained, config.validation, seed=config.seed)
    if len(rows) == 0:
        raise DataError(
            f"none of the {len(store)} rows has a token to train on; choose another train_on or a longer max_length",
            place="dataset",
        )
    held_out = [HeldOut(label="split", store=store, rows=held_out_rows)] if len(held_out_rows) else []
    for version in recipe.validation_versions.select_related("dataset"):
        held_out += _other(version, config, info, progress)
    plan = BatchPlan(
        rows,
        store.lengths,
        seed=config.seed,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
    )
    return Material(store=store, rows=rows, plan=plan, held_out=held_out)


def _store(
    version: DatasetVersion, config: SftConfig, info: BaseModelInfo, progress: _Progress
) -> TokenStore:
    return tokens.prepare(
        version,
        config.base_model,
        train_on=config.train_on,
        max_length=config.max_length or defaults.max_length(info),
        progress=progress.enter,
    )


def _other(
    version: DatasetVersion, config: SftConfig, info: BaseModelInfo, progress: _Progress
) -> list[HeldOut]:
    """Return a dataset given for validation, or a seeded part of a large one."""
    store = _store(version, config, info, progress)
    rows = some_of(store.num_trained, max_rows=config.validation.max_rows, seed=config.seed)
    label = version.dataset.name[:_MAX_LABEL] or version.dataset.public_id
    return [HeldOut(label=label, store=store, rows=rows)] if len(rows) else []


def _when_loaded(base_model: str) -> BaseModelInfo:
    """Wait for a worker to say what the base model is like."""
    while not (info := base_models.get(base_model)).is_loaded:
        time.sleep(_PROGRESS_S)
    return info


class _Progress:
    """Enters how far the reading is, now and then."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._next_at = 0.0

    def enter(self, share: float) -> None:
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _PROGRESS_S
            recipe_steps.enter_progress(self._recipe, share)
