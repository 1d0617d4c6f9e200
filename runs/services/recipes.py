"""Runs that need no code: start and fork them, and steer them while they train.

The loop that trains them is `runs.recipes.loop`; both sides meet in the recipe's row. Every change of
state is made under a lock on that row and leaves an event on the run's chart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from django.db import transaction
from django.db.models import Q
from django.db.models.functions import Now

from runs import events
from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, Evaluation, Operation, Recipe, TrainingRun, User
from runs.schemas.recipes import MAX_STEPS, Changes, SftConfig
from runs.services import (
    data_starts,
    recipe_checks,
    recipe_rows,
    recipe_samples,
    recipe_steps,
    sessions,
    training_runs,
)
from runs.services.data_starts import BEGINNING
from runs.services.recipe_rows import State
from runs.services.training_runs import Lora, Start

# What a person may do in each state.
ACTIONS: Final[Mapping[str, tuple[State, ...]]] = {
    "pause": (State.PREPARING, State.QUEUED, State.RUNNING),
    "resume": (State.PAUSED, State.STOPPED),
    "stop": (State.PREPARING, State.QUEUED, State.RUNNING, State.PAUSED, State.FINISHING, State.STOPPING),
    "change": (State.PREPARING, State.QUEUED, State.RUNNING, State.PAUSED),
    "save": (State.RUNNING, State.PAUSED),
    "extend": (State.FINISHED, State.STOPPED),
    "retry": (State.FAILED,),
}
# Settings that the loop needs decided once a run's data is read.
_DECIDED: Final = ("num_steps", "learning_rate", "eval_every", "save_every")


def start(user: User, config: SftConfig, *, name: str = "", source: str) -> TrainingRun:
    """Start a run on a dataset; it waits for its turn behind those that started before.

    Raises:
        RequestInvalid: names each setting that cannot be.
    """
    return _start(user, config, name=name, source=source, checkpoint=None, with_optimizer=False)


def fork(
    user: User,
    checkpoint: Checkpoint,
    *,
    with_optimizer: bool,
    changes: Mapping[str, Any],
    name: str = "",
    source: str,
) -> TrainingRun:
    """Start a run from a checkpoint, with the settings of the run that made it and some changed.

    With the optimizer state it goes on at the checkpoint's step; without, its steps count from 0. The
    checkpoint of a run without settings (one of an SDK client) needs them all in `changes`. Base model and adapter
    are the checkpoint's.

    Raises:
        RequestInvalid: names each setting that cannot be.
    """
    if with_optimizer and checkpoint.kind != Checkpoint.Kind.TRAINING:
        raise RequestInvalid("sampler weights hold no optimizer state", place="with_optimizer")
    parent = recipe_rows.saved_by(checkpoint)
    run = checkpoint.run
    held = dict(parent.config) if parent is not None else {}
    if "num_epochs" in changes:
        held.pop("num_steps", None)
    held |= {"base_model": run.base_model, "lora": recipe_checks.adapter_of(run)}
    config = recipe_checks.parse_config(recipe_checks.merged(held, changes))
    recipe_checks.refuse_other_adapter(config, run)
    if with_optimizer and config.num_steps is not None and config.num_steps <= checkpoint.step:
        raise RequestInvalid(
            f"{config.num_steps} is not after step {checkpoint.step}, where the fork starts",
            place="num_steps",
        )
    return _start(
        user, config, name=name, source=source, checkpoint=checkpoint, with_optimizer=with_optimizer
    )


# -- steering ------------------------------------------------------------------------------------------


def pause(recipe: Recipe) -> None:
    """Submit no further steps; those in the log already, about two seconds of them, are still done."""
    with _steering(recipe, "pause") as row:
        row.state = State.PAUSED
        recipe_rows.note(row, "paused")


def resume(recipe: Recipe) -> None:
    """Go on after a pause or a stop, behind the runs that wait already."""
    with _steering(recipe, "resume") as row:
        _queue(row)
        recipe_rows.note(row, "resumed")


def stop(recipe: Recipe, *, keep: bool) -> None:
    """End the run early: with a last checkpoint, or without keeping any of its weights."""
    with _steering(recipe, "stop") as row:
        if not keep:
            recipe_rows.submit(row, Operation.Kind.UNLOAD_MODEL, b"{}")
        elif row.next_step > row.first_step:
            recipe_rows.submit_save(row, name=recipe_rows.FINAL)
        row.state = State.STOPPING if keep else State.DISCARDING
        recipe_rows.note(row, "stopping", kept="weights" if keep else "charts and samples only")


def change(recipe: Recipe, changes: Changes) -> None:
    """Change settings from the next step that is not in the log yet; an event says what they were.

    Raises:
        RequestInvalid: nothing is changed, the run has passed the new end already, a setting is left open that was
            decided when the run's data was read, or early stopping has no validation loss to go by.
    """
    with _steering(recipe, "change") as row:
        held = recipe_checks.merged(row.config, changes.given())
        given = {key: value for key, value in held.items() if row.config.get(key) != value}
        if not given:
            raise RequestInvalid("nothing to change: the settings have these values already")
        _refuse_open(row, given)
        if given.get("num_steps") is not None and given["num_steps"] <= row.next_step:
            raise RequestInvalid(
                f"{given['num_steps']} is not after step {row.next_step}, which is submitted already",
                place="num_steps",
            )
        if given.get("num_steps") is not None:
            held["num_epochs"] = None
        config = recipe_checks.parse_config(held)
        if "early_stopping" in given:
            _refuse_blind(row, config)
        detail = {key: _told(row.config.get(key), value) for key, value in given.items()}
        row.config = config.model_dump(mode="json")
        row.num_steps = config.num_steps or row.num_steps
        if row.started_at is not None:  # a run that starts asks for those that it has by then
            recipe_samples.ask_base_model(row, config.samples.prompts)
        recipe_rows.note(row, "changed", **detail)


def save_now(recipe: Recipe, *, name: str = "") -> str:
    """Save a checkpoint after what is submitted already; returns its name.

    Raises:
        RequestInvalid: the run has a checkpoint of that name, or gives such names by itself.
    """
    with _steering(recipe, "save") as row:
        name = name or f"manual-{row.next_step:06d}"
        _refuse_name(row, name)
        recipe_rows.submit_save(row, name=name, overwrite=False)
    return name


def extend(recipe: Recipe, num_steps: int) -> None:
    """Train an ended run for more steps; the schedule is stretched to the new end.

    The weights of the old end stay under a name of their own: they may be the best, and `final` is to be overwritten.

    Raises:
        RequestInvalid: the new end is beyond the most steps that a run has.
    """
    if not 1 <= num_steps <= MAX_STEPS:
        raise RequestInvalid(f"must be 1 to {MAX_STEPS}, got {num_steps}", place="num_steps")
    with _steering(recipe, "extend") as row:
        end = row.next_step + num_steps
        if end > MAX_STEPS:
            raise RequestInvalid(
                f"{num_steps} more after step {row.next_step} end at {end}; a run has at most {MAX_STEPS} steps",
                place="num_steps",
            )
        if row.next_step > row.first_step:
            # Over one of that name, too: what was saved behind a step that failed is not what its retry has come to.
            recipe_rows.submit_save(row, name=recipe_rows.automatic_name(row.next_step))
        held = {**row.config, "num_steps": end, "num_epochs": None}
        row.config = recipe_checks.parse_config(held).model_dump(mode="json")
        row.num_steps = end
        _queue(row)
        recipe_rows.note(row, "extended", num_steps=num_steps, end=row.num_steps)


def retry(recipe: Recipe) -> None:
    """Go on after a failure, from the newest checkpoint with optimizer state from before it.

    What was measured and is to be sampled after that checkpoint's step is forgotten: these steps are done again.

    Raises:
        RequestInvalid: there is no such checkpoint, or the run cannot go on.
    """
    with _steering(recipe, "retry") as row:
        checkpoint = retry_point(row)
        if row.run.state != TrainingRun.State.OPEN or (checkpoint is None and row.next_step > row.first_step):
            raise RequestInvalid("no checkpoint to go on from; start the same run again instead")
        row.watched_seq = row.next_seq - 1  # before the load, which the recipe must see fail
        if checkpoint is not None:
            recipe_rows.submit_load(row, checkpoint)
            row.next_step = checkpoint.step
            Evaluation.objects.filter(run_id=row.run_id, step__gt=checkpoint.step).delete()
            recipe_samples.forget_unasked(row, after_step=checkpoint.step)
            if row.best_step is not None and row.best_step > checkpoint.step:
                row.best_step = recipe_steps.best_step(row)
        row.error = ""
        _queue(row)
        recipe_rows.note(row, "retried", from_step=row.next_step)


def retry_point(recipe: Recipe) -> Checkpoint | None:
    """Return the checkpoint that `retry` would load: the newest that no failed step lies before.

    What is in the log behind a step that failed is done all the same, saves too, and lacks that step's batch.
    """
    found = Checkpoint.objects.filter(
        run_id=recipe.run_id, kind=Checkpoint.Kind.TRAINING, step__lte=recipe.next_step
    )
    spoiled = _spoiled(recipe)
    newest_first = found.order_by("-step", "-seq")
    return next((one for one in newest_first if not any(one.seq in seqs for seqs in spoiled)), None)


def _start(
    user: User,
    config: SftConfig,
    *,
    name: str,
    source: str,
    checkpoint: Checkpoint | None,
    with_optimizer: bool,
) -> TrainingRun:
    version, validation = recipe_checks.check_config(user, config)
    held = recipe_checks.pinned(config, version, validation).model_dump(mode="json")
    first_step, data_start, held_out_by = 0, BEGINNING, Recipe.HeldOutBy.CONTENT.value
    if checkpoint is not None and with_optimizer:
        first_step, data_start = checkpoint.step, data_starts.of_fork(checkpoint, config, version)
    if checkpoint is not None and (parent := recipe_rows.saved_by(checkpoint)) is not None:
        held_out_by = parent.held_out_by
    with transaction.atomic():
        run = _make_run(user, config, name, source, checkpoint, with_optimizer)
        recipe = Recipe.objects.create(
            run=run,
            name=config.recipe,
            config=held,
            started_config=held,
            dataset_version=version,
            first_step=first_step,
            data_step=data_start.step,
            data_row=data_start.row,
            held_out_by=held_out_by,
            next_step=first_step,
            num_steps=config.num_steps or 0,
        )
        recipe.validation_versions.set(validation)
        if checkpoint is not None:
            recipe_rows.note(recipe, "forked", path=run.parent_path, optimizer=with_optimizer)
    events.ring_recipes()
    return run


def _make_run(
    user: User,
    config: SftConfig,
    name: str,
    source: str,
    checkpoint: Checkpoint | None,
    with_optimizer: bool,
) -> TrainingRun:
    session = sessions.create_session(user, tags=[source], display_name=name[:200])
    lora = config.lora
    run, _ = training_runs.create_run(
        session,
        model_seq_id=0,
        base_model=config.base_model,
        lora=Lora(
            rank=lora.rank,
            seed=config.seed,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
        ),
        start=None if checkpoint is None else Start(checkpoint=checkpoint, with_optimizer=with_optimizer),
        source=source,
        name=name[:200],
    )
    return run


@contextmanager
def _steering(recipe: Recipe, action: str) -> Iterator[Recipe]:
    with recipe_rows.locked(recipe) as row:
        if row.state not in ACTIONS[action]:
            allowed = ", ".join(state.value for state in ACTIONS[action])
            raise RequestInvalid(
                f"cannot {action} a run that is {row.state}; it must be {allowed}", place="state"
            )
        yield row
    recipe.refresh_from_db()
    events.ring_recipes()


def _refuse_open(row: Recipe, given: Mapping[str, Any]) -> None:
    for name in _DECIDED:
        if row.preparation and given.get(name, ...) is None:
            raise RequestInvalid("must be a number now that the run's data is read, got null", place=name)


def _refuse_blind(row: Recipe, config: SftConfig) -> None:
    patience, num_rows = config.early_stopping, row.preparation.get("num_validation_rows", 1)
    if patience is not None and not (num_rows and recipe_checks.has_validation(config, row.dataset_version)):
        raise RequestInvalid(
            f"{patience} needs a validation loss, and this run measures none", place="early_stopping"
        )


def _spoiled(recipe: Recipe) -> list[range]:
    """Return the stretches of the log that were done after a step had failed, each up to the load that ended it."""
    failures = Q(state=Operation.State.FAILED, kind__in=recipe_rows.FATAL)
    good_loads = Q(state=Operation.State.DONE, kind=Operation.Kind.LOAD_WEIGHTS)
    rows = Operation.objects.filter(failures | good_loads, run_id=recipe.run_id).order_by("seq")
    stretches, failed_at = [], None
    for seq, state in rows.values_list("seq", "state"):
        if state == Operation.State.FAILED:
            failed_at = seq if failed_at is None else failed_at
        elif failed_at is not None:
            stretches.append(range(failed_at, seq))
            failed_at = None
    return stretches if failed_at is None else [*stretches, range(failed_at, recipe.next_seq)]


def _refuse_name(row: Recipe, name: str) -> None:
    """Refuse a checkpoint's name that another one has, or that is given without asking."""
    final, automatic = recipe_rows.FINAL, recipe_rows.AUTOMATIC
    if name == final or name.startswith(automatic):
        raise RequestInvalid(
            f"{final} and names that begin with {automatic} are the run's own, got {name}", place="name"
        )
    if name in recipe_rows.saved_names(row):
        raise RequestInvalid(f"{name} is the name of a checkpoint of this run; choose another", place="name")


def _queue(row: Recipe) -> None:
    row.state = State.QUEUED if row.preparation else State.PREPARING
    row.queued_at = Now()
    row.ended_at = None


def _told(old: Any, new: Any) -> str:
    """Return a change in words; of an object only what is different."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in new if old.get(name) != new[name]]
        old, new = {name: old.get(name) for name in names}, {name: new[name] for name in names}
    return f"{_short(old)} to {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
