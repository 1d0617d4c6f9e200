"""Where in the order of its data a run begins.

A fork with the optimizer's state counts its steps on from its checkpoint's. On the data of its parent it goes on
behind what the parent trained on; other data it sees from their beginning.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from runs.models import Checkpoint, DatasetVersion
from runs.schemas.recipes import SftConfig
from runs.services import recipe_rows


class DataStart(NamedTuple):
    """At `step` a run is at place `row` in the order of its rows, which is counted on over the epochs."""

    step: int = 0
    row: int = 0


BEGINNING: Final = DataStart()


def of_fork(checkpoint: Checkpoint, config: SftConfig, version: DatasetVersion) -> DataStart:
    """Return where a fork that takes the optimizer's state with it begins in its training data."""
    anew = DataStart(step=checkpoint.step)
    parent = recipe_rows.saved_by(checkpoint)
    if parent is None or parent.dataset_version_id != version.pk:
        return anew
    parents = SftConfig.model_validate(parent.config)
    if not _have_one_order(config, parents):
        return anew
    if (config.batch_size, config.batch_tokens) == (parents.batch_size, parents.batch_tokens):
        return DataStart(step=parent.data_step, row=parent.data_row)
    if parents.batch_tokens is not None:  # how many rows its steps had, only their tokens could tell
        return anew
    num_steps = checkpoint.step - parent.data_step
    return DataStart(step=checkpoint.step, row=parent.data_row + num_steps * parents.batch_size)


def _have_one_order(config: SftConfig, parents: SftConfig) -> bool:
    """Say whether two runs on one dataset see the same rows in the same order."""
    return (
        (config.seed, config.train_on, config.max_length)
        == (parents.seed, parents.train_on, parents.max_length)
        and config.validation.share == parents.validation.share
        and config.validation.max_rows == parents.validation.max_rows
    )
