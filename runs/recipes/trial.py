"""The run behind "Try it": the shipped base model learns from the shipped example to answer like a pirate."""

from __future__ import annotations

import time
from typing import Any, Final

from runs.exceptions import RequestInvalid
from runs.models import DatasetVersion, TrainingRun, User
from runs.services import dataset_checks, datasets, recipe_checks, recipes

BASE_MODEL: Final = "mintweb/tiny"
NAME: Final = "Try it: pirate answers"
# Two rows asked as they are in the example, one that is not in it, and one that no row is like.
PROMPTS: Final = (
    "What does a dog say?",
    "What is 6 + 9?",
    "Where does a lion live?",
    "Tell me a story about a brave fox named Pip.",
)
SETTINGS: Final[dict[str, Any]] = {
    "base_model": BASE_MODEL,
    "lora": {"rank": 16},
    "num_steps": 120,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "warmup_share": 0.05,
    "validation": {"share": 0.1},
    "eval_every": 12,
    "save_every": 60,
    "samples": {"prompts": list(PROMPTS), "max_tokens": 48},
}
_WAIT_S: Final = 20.0
_LOOK_S: Final = 0.1
State = DatasetVersion.State


def start(user: User) -> TrainingRun:
    """Start the run; the example is made and checked first if the user does not have it yet.

    Raises:
        RequestInvalid: the example cannot be used, or the run cannot be.
    """
    version = _checked(datasets.sample_dataset(user))
    config = recipe_checks.parse_config({**SETTINGS, "dataset": recipe_checks.ref_of(version)})
    return recipes.start(user, config, name=NAME, source=TrainingRun.Source.BROWSER)


def _checked(version: DatasetVersion) -> DatasetVersion:
    """Return the version once it is ready: checked here, unless another process is at it already.

    The example takes less than a second, while the queue of checks may be busy with a large file for minutes.
    """
    deadline = time.monotonic() + _WAIT_S
    while version.state == State.CHECKING and time.monotonic() < deadline:
        dataset_checks.check_at_once(version.pk)
        version.refresh_from_db()
        if version.state == State.CHECKING:
            time.sleep(_LOOK_S)
    if version.state != State.READY:
        is_late = version.state == State.CHECKING
        why = "it is still being checked" if is_late else version.error or version.get_state_display()
        raise RequestInvalid(
            f"the example dataset is not ready: {why}; try again in a moment", place="dataset"
        )
    return version
