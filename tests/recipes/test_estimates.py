"""What a run comes to before it starts, against what its loop then does; and the pace of earlier steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_django.fixtures import Settings

from runs.models import DatasetVersion, Metric, User
from runs.recipes import batches, estimates, paces, tokens
from runs.schemas.recipes import SftConfig
from runs.services import base_models
from runs.services.base_models import BaseModelInfo
from runs.services.data_starts import BEGINNING, DataStart
from tests.pages import recipe_seed, seed
from tests.recipes.conftest import BASE_MODEL, questions

AddDataset = Callable[..., DatasetVersion]


@pytest.fixture
def info(transactional_db: None, base_model: str, settings: Settings, tmp_path: Path) -> BaseModelInfo:
    """Return the tiny model, with an empty cache of tokens."""
    settings.DATA_DIR = tmp_path / "data"
    return base_models.get(BASE_MODEL)


@pytest.fixture
def version(info: BaseModelInfo, add_dataset: AddDataset) -> DatasetVersion:
    """Return 90 rows, the last of them far longer than the others."""
    long = " ".join(f"{number} + 1 = {number + 1}." for number in range(60))
    row = {"messages": [{"role": "user", "content": "Count!"}, {"role": "assistant", "content": long}]}
    return add_dataset([*questions(89), row])


def config(version: DatasetVersion, **values: Any) -> SftConfig:
    ref = f"{version.dataset.public_id}@{version.number}"
    return SftConfig.model_validate({"base_model": BASE_MODEL, "dataset": ref, **values})


def prepared(version: DatasetVersion, *, max_length: int = 4096) -> tokens.TokenStore:
    return tokens.prepare(
        version, BASE_MODEL, train_on="assistant", max_length=max_length, progress=lambda share: None
    )


def amounts(
    version: DatasetVersion,
    info: BaseModelInfo,
    *,
    first_step: int = 0,
    data_start: DataStart = BEGINNING,
    **values: Any,
) -> estimates.Amounts:
    return estimates.amounts_of(
        config(version, **values), [version], info, first_step=first_step, data_start=data_start
    )


def test_the_doctors_sample_comes_near_what_the_tokens_are(
    version: DatasetVersion, info: BaseModelInfo
) -> None:
    guess = estimates.lengths_of(version, config(version), info)
    store = prepared(version)
    exact = estimates.lengths_of(version, config(version), info)
    assert (guess.is_exact, exact.is_exact) == (False, True)
    assert exact.mean == pytest.approx(float(store.lengths.mean()))
    assert (exact.num_rows, exact.num_usable, exact.longest) == (90, 90, int(store.lengths.max()))
    assert guess.mean == pytest.approx(exact.mean, rel=0.1)
    assert guess.longest == pytest.approx(exact.longest, rel=0.1)
    assert guess.share_truncated == exact.share_truncated == 0


def test_rows_that_are_cut_are_counted(version: DatasetVersion, info: BaseModelInfo) -> None:
    short = config(version, max_length=100)
    guess = estimates.lengths_of(version, short, info)
    prepared(version, max_length=100)
    exact = estimates.lengths_of(version, short, info)
    assert exact.longest == guess.longest == 100
    assert exact.share_truncated == pytest.approx(1 / 90)
    assert guess.share_truncated == pytest.approx(1 / 90)
    assert guess.mean == pytest.approx(exact.mean, rel=0.1)


@pytest.mark.parametrize(
    "values", [{}, {"batch_size": 7}, {"num_epochs": 0.4}, {"num_epochs": 2.5, "batch_size": 64}]
)
def test_a_run_has_the_steps_that_its_loop_does(
    version: DatasetVersion, info: BaseModelInfo, values: dict[str, Any]
) -> None:
    store = prepared(version)
    wanted = config(version, **values)
    num_held_out = batches.num_held_out(int(np.count_nonzero(store.num_trained)), wanted.validation)
    plan = batches.BatchPlan(
        np.arange(len(store) - num_held_out, dtype=np.int64),
        store.lengths,
        seed=1,
        batch_size=wanted.batch_size,
        batch_tokens=None,
    )
    found = amounts(version, info, **values)
    assert found.num_steps == plan.num_steps(wanted.num_epochs or 3)
    assert (found.num_train_rows, found.num_validation_rows) == (90 - num_held_out, num_held_out)
    assert found.total_tokens == pytest.approx(
        found.num_steps * wanted.batch_size * store.lengths.mean(), abs=1
    )


def test_batches_by_tokens_are_about_as_many(version: DatasetVersion, info: BaseModelInfo) -> None:
    store = prepared(version)
    found = amounts(version, info, batch_tokens=600, validation={"share": 0})
    plan = batches.BatchPlan(
        np.arange(90, dtype=np.int64), store.lengths, seed=1, batch_size=8, batch_tokens=600
    )
    assert found.num_steps == pytest.approx(plan.num_steps(3), rel=0.25)
    assert not found.is_exact


def test_a_fork_does_what_is_left(version: DatasetVersion, info: BaseModelInfo) -> None:
    assert amounts(version, info, num_steps=50, first_step=20).num_steps == 30
    assert amounts(version, info, num_steps=50, first_step=60).num_steps == 0
    whole = amounts(version, info)
    assert amounts(version, info, first_step=5).num_steps == whole.num_steps - 5
    anew = DataStart(step=5)
    assert amounts(version, info, first_step=5, data_start=anew).num_steps == whole.num_steps
    behind = DataStart(step=5, row=3 * 8)
    assert amounts(version, info, first_step=5, data_start=behind).num_steps == whole.num_steps - 3


def test_a_dataset_that_nobody_measured_is_guessed_from_its_size(
    version: DatasetVersion, info: BaseModelInfo
) -> None:
    exact = estimates.lengths_of(version, config(version), info).mean
    for kept in ({"characters", "roles"}, set()):
        version.report = {name: value for name, value in version.report.items() if name in kept}
        guess = estimates.lengths_of(version, config(version), info)
        assert exact / 3 < guess.mean < exact * 3
        assert not guess.is_exact
        assert guess.num_rows == 90


def test_time_is_all_tokens_at_the_pace(version: DatasetVersion, alice: User, info: BaseModelInfo) -> None:
    settings = config(version, num_steps=100)
    assert estimates.estimate(settings, [version]).time_range_s is None
    found = replace(
        estimates.estimate(settings, [version]), pace=paces.Pace(low=10.0, high=100.0, num_steps=20)
    )
    total = found.amounts.total_tokens
    assert found.time_range_s == (total / 100.0, total / 10.0)
    assert (found.config.eval_every, found.config.save_every, found.config.samples.every) == (10, 10, 10)


# -- the pace of earlier steps ---------------------------------------------------------------------------


def add_steps(user: User, rates: list[float], *, tokens: float = 100.0, is_recipe: bool = True) -> None:
    run = seed.make_run(user)
    if is_recipe:
        recipe_seed.make_recipe(run)
    rows = [(n, n, {"tokens": tokens, "tokens_per_s": rate}) for n, rate in enumerate(rates, start=1)]
    seed.add_values(run, rows)


def test_a_pace_is_the_middle_of_the_steps_there_were(alice: User, base_model: str) -> None:
    add_steps(alice, [float(rate) for rate in range(1, 102)] + [0.0] * 50)
    pace = paces.of_base_model(BASE_MODEL, step_tokens=100)
    assert pace == paces.Pace(low=11.0, high=91.0, num_steps=101)
    assert paces.of_base_model("another", step_tokens=100) is None


def test_a_pace_needs_twenty_steps_of_like_size(alice: User, base_model: str) -> None:
    add_steps(alice, [1.0] * 19)
    assert paces.of_base_model(BASE_MODEL, step_tokens=100) is None
    add_steps(alice, [1.0])
    for size, is_known in ((24, False), (25, True), (400, True), (401, False)):
        assert (paces.of_base_model(BASE_MODEL, step_tokens=size) is not None) == is_known, size


def test_a_clients_loop_tells_nothing_of_the_pace(alice: User, base_model: str) -> None:
    add_steps(alice, [1.0] * 50, is_recipe=False)  # its own pauses are in there
    assert paces.of_base_model(BASE_MODEL, step_tokens=100) is None


def test_the_newest_runs_tell_the_pace(alice: User, base_model: str) -> None:
    add_steps(alice, [1.0] * 30)
    for _ in range(10):
        add_steps(alice, [50.0] * 30)
    pace = paces.of_base_model(BASE_MODEL, step_tokens=100)
    assert pace is not None
    assert (pace.low, pace.num_steps) == (50.0, 300)
    Metric.objects.filter(name="tokens_per_s", value=50.0).update(value=float("nan"))
    assert paces.of_base_model(BASE_MODEL, step_tokens=100) is None
