"""What the loop of `runs.recipes` writes: each function is one transaction that a killed loop has done or not.

All of them look again at the recipe's row under its lock, so that steering and a second loop are safe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from django.db import connection, transaction
from django.db.models.functions import Now

from runs.models import Checkpoint, Evaluation, Operation, Recipe, RunEvent
from runs.schemas import results
from runs.schemas.recipes import SftConfig
from runs.services import checkpoints, recipe_rows, recipe_samples, webhooks
from runs.services.advisory_locks import LockClass
from runs.services.claims import LONE_ATTEMPTS
from runs.services.recipe_rows import RunDeleted, State

VALIDATION_LOSS: Final = "validation_loss"


@dataclass(frozen=True, kw_only=True)
class NewOperation:
    """An operation to submit; its payload holds its seq where the wire form does."""

    kind: str
    payload: bytes
    num_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class NewEvaluation:
    """The forwards that measure the loss of one held-out dataset."""

    label: str
    forwards: Sequence[NewOperation]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is submitted together: the operations of a step, and what is due after it.

    `is_last`: the run's last checkpoint follows, so the evaluation is that of saved weights.
    """

    operations: Sequence[NewOperation] = ()
    evaluations: Sequence[NewEvaluation] = ()
    save: bool = False
    is_last: bool = False
    prompts: Sequence[str] = ()


def enter_progress(recipe: Recipe, share: float) -> None:
    """Note how much of the dataset is read."""
    with recipe_rows.locked(recipe) as row:
        row.progress = share


def prepared(recipe: Recipe, config: SftConfig, preparation: dict[str, Any]) -> None:
    """Let a recipe whose data is ready wait for a slot, every open setting decided, unless one changed meanwhile."""
    with recipe_rows.locked(recipe) as row:
        if (row.state, row.config) == (State.PREPARING, recipe.config):
            row.config = config.model_dump(mode="json")
            row.num_steps = config.num_steps or 0
            row.preparation = preparation
            row.progress = 1.0
            row.state = State.QUEUED


def begin(recipe: Recipe, first: Step) -> bool:
    """Start or go on when a slot is free; `first` is what a run that starts submits before it trains."""
    with transaction.atomic():
        _only_one_counts_slots()
        if not recipe_rows.has_free_slot():
            return False
        with recipe_rows.locked(recipe) as row:
            if row.state != State.QUEUED:
                return False
            row.state = State.RUNNING
            if row.started_at is not None:
                recipe_samples.ask_base_model_again(row)
            else:
                row.started_at = Now()
                recipe_rows.note(row, "started", num_steps=row.num_steps)
                _submit(row, first)
                recipe_samples.ask_base_model(row, first.prompts)
            if row.next_step >= row.num_steps:  # a retry from its last checkpoint
                _finish(row)
    return True


def submit_step(recipe: Recipe, step: Step) -> bool:
    """Submit the next step; false when the recipe is no longer where the caller saw it."""
    with recipe_rows.locked(recipe) as row:
        if (row.state, row.next_seq, row.config) != (State.RUNNING, recipe.next_seq, recipe.config):
            return False
        row.next_step += 1
        _submit(row, step)
        if row.next_step >= row.num_steps:
            _finish(row)
    return True


def finish_early(recipe: Recipe, *, best_step: int, patience: int) -> None:
    """End a run that does not get better."""
    with recipe_rows.locked(recipe) as row:
        if row.state == State.RUNNING:
            recipe_rows.note(row, "early_stopped", best_step=best_step, patience=patience)
            row.num_steps = row.next_step
            _finish(row)


def extended_at(recipe: Recipe) -> int:
    """Return the step from which the run was last extended, 0 when it never was."""
    steps = RunEvent.objects.filter(run_id=recipe.run_id, kind="extended").order_by("-seq", "-pk")
    return steps.values_list("step", flat=True).first() or 0


def watch(recipe: Recipe) -> None:
    """Look at what the worker did since: enter saves as events, and a failed step as the run's failure."""
    run = recipe.run
    with recipe_rows.locked(recipe) as row:
        done = Operation.objects.filter(run=run, seq__gt=row.watched_seq, seq__lte=run.applied_seq).order_by(
            "seq"
        )
        for seq, kind, state, error in done.values_list("seq", "kind", "state", "error"):
            if state == Operation.State.FAILED and kind in recipe_rows.FATAL:
                _fail(row, f"operation {seq} ({kind}) failed: {error}")
                break
            _note_done(row, seq, kind, "" if state == Operation.State.DONE else error)
        row.watched_seq = run.applied_seq
        _settle_best(row, has_saved=done.filter(kind=Operation.Kind.SAVE_WEIGHTS).exists())


def fail(recipe: Recipe, error: str) -> None:
    """End a recipe that cannot go on; one that was deleted meanwhile has ended."""
    with suppress(RunDeleted), recipe_rows.locked(recipe) as row:
        if row.state in recipe_rows.ACTIVE:
            _fail(row, error)


def end(recipe: Recipe, state: State) -> None:
    """Enter the end of a recipe whose last operations are done."""
    with recipe_rows.locked(recipe) as row:
        if row.state == recipe.state:
            row.state = state
            row.ended_at = Now()
            recipe_rows.note(row, state.value)
            is_finished = state == State.FINISHED
            webhooks.run_ended(row.run, webhooks.FINISHED if is_finished else webhooks.STOPPED)
            recipe_samples.give_up_unasked(row)


def failed_final(recipe: Recipe) -> Operation | None:
    """Return the save of the last checkpoint of a recipe that ends, if the server could not do it."""
    if recipe.next_step == recipe.first_step:  # nothing was trained, so nothing is to be saved
        return None
    saves = Operation.objects.filter(run_id=recipe.run_id, kind=Operation.Kind.SAVE_WEIGHTS)
    newest = saves.order_by("-seq").defer("payload", "result").first()
    if newest is None or newest.error_category != "server" or newest.lone_attempts >= LONE_ATTEMPTS:
        return None
    return newest


def save_again(recipe: Recipe, failed: Operation, *, after_s: float) -> bool:
    """Submit the last checkpoint's save again; false until so many seconds after it has failed."""
    with recipe_rows.locked(recipe) as row:
        is_due = Operation.objects.filter(
            pk=failed.pk, finished_at__lte=Now() - timedelta(seconds=after_s)
        ).exists()
        if is_due and (row.state, row.next_seq) == (recipe.state, recipe.next_seq):
            recipe_rows.submit_save(row, name=recipe_rows.FINAL)
    return is_due


def delete_weights(recipe: Recipe) -> None:
    """Delete every checkpoint of the recipe's run."""
    checkpoints.delete(*Checkpoint.objects.filter(run_id=recipe.run_id))


def prune(recipe: Recipe, *, keep: int) -> None:
    """Delete automatic checkpoints beyond the newest ones and the best; one to be measured yet may be that.

    Args:
        keep: how many stay, with the best.
    """
    automatic = Checkpoint.objects.filter(run_id=recipe.run_id, name__startswith=recipe_rows.AUTOMATIC)
    unmeasured = {recipe_rows.automatic_name(one.step) for one in open_evaluations(recipe)}
    rows = list(automatic.exclude(name__in=unmeasured).order_by("-step"))
    if len(rows) <= keep:
        return
    losses = {
        recipe_rows.automatic_name(step): loss
        for step, (loss, _) in overall_losses(recipe).items()
        if math.isfinite(loss)
    }
    measured = [row for row in rows if row.name in losses]
    best = min(measured, key=lambda row: (losses[row.name], row.step), default=rows[0])
    checkpoints.delete(*[row for row in rows if row != best][keep - 1 :])


# -- evaluations -----------------------------------------------------------------------------------------


def open_evaluations(recipe: Recipe) -> list[Evaluation]:
    """Return the evaluations without a loss, in order of step."""
    return list(Evaluation.objects.filter(run_id=recipe.run_id, loss=None).order_by("step", "first_seq"))


def close_evaluations(recipe: Recipe, group: Sequence[Evaluation]) -> None:
    """Enter the losses of one step's evaluations, whose forwards are done, and record them as metrics."""
    with recipe_rows.locked(recipe) as row:
        fresh = list(
            Evaluation.objects.filter(pk__in=[one.pk for one in group], loss=None).order_by("first_seq")
        )
        if len(fresh) != len(group):
            return
        for evaluation in fresh:
            _measure(row, evaluation)
        _record(row, fresh)
        _note_best(row, fresh[0].step)


def overall_losses(recipe: Recipe) -> dict[int, tuple[float, bool]]:
    """Return (loss over all held-out tokens, whether there is a checkpoint) of each evaluated step."""
    by_step: dict[int, list[Evaluation]] = {}
    for one in Evaluation.objects.filter(run_id=recipe.run_id, loss__isnull=False):
        by_step.setdefault(one.step, []).append(one)
    return {step: (_overall(group), group[0].has_checkpoint) for step, group in sorted(by_step.items())}


def best_step(recipe: Recipe) -> int | None:
    """Return the step of the checkpoint with the lowest validation loss, None before one is measured."""
    losses = _saved_losses(recipe)
    return min(losses, key=losses.__getitem__) if losses else None


# -- parts -----------------------------------------------------------------------------------------------


def _submit(row: Recipe, step: Step) -> None:
    for operation in step.operations:
        recipe_rows.submit(row, operation.kind, operation.payload, num_tokens=operation.num_tokens)
    for evaluation in step.evaluations:
        first_seq = row.next_seq
        for forward in evaluation.forwards:
            recipe_rows.submit(row, forward.kind, forward.payload, num_tokens=forward.num_tokens)
        Evaluation.objects.create(
            run_id=row.run_id,
            step=row.next_step,
            label=evaluation.label,
            first_seq=first_seq,
            last_seq=row.next_seq - 1,
            has_checkpoint=step.save or step.is_last,
        )
    if step.save:
        recipe_rows.submit_save(row, name=recipe_rows.automatic_name(row.next_step))
    if step.prompts and row.next_step > row.first_step:
        recipe_samples.save(row, step.prompts)


def _finish(row: Recipe) -> None:
    recipe_rows.submit_save(row, name=recipe_rows.FINAL)
    row.state = State.FINISHING


def _fail(row: Recipe, error: str) -> None:
    row.state = State.FAILED
    row.error = error
    row.ended_at = Now()
    recipe_rows.note(row, "failed", error=error)
    webhooks.run_ended(row.run, webhooks.FAILED, error=error)
    recipe_samples.give_up_unasked(row)


def _note_done(row: Recipe, seq: int, kind: str, error: str) -> None:
    if kind == Operation.Kind.SAVE_WEIGHTS:
        saved = Checkpoint.objects.filter(run_id=row.run_id, seq=seq).first()
        if saved is not None:
            recipe_rows.note_at(row, saved.step, "saved", checkpoint=saved.name)
        elif error and not _is_saved_again(row):
            recipe_rows.note(row, "save_failed", error=error)
    elif error and kind == Operation.Kind.FORWARD:
        recipe_rows.note(row, "evaluation_failed", error=error)


def _is_saved_again(row: Recipe) -> bool:
    """Say whether a save that failed is one of those of a last checkpoint that are tried until one succeeds."""
    is_last = row.state in (State.FINISHING, State.STOPPING)
    told = RunEvent.objects.filter(run_id=row.run_id, kind="save_failed", step=row.next_step)
    return is_last and told.exists()


def _measure(row: Recipe, evaluation: Evaluation) -> None:
    """Enter an evaluation's loss; forwards that failed make it NaN."""
    rows = Operation.objects.filter(
        run_id=row.run_id, seq__gte=evaluation.first_seq, seq__lte=evaluation.last_seq
    )
    loss, weight, num_tokens = 0.0, 0.0, 0
    for result in rows.values_list("result", flat=True):
        if result is None:
            loss = math.nan
            continue
        _, measured = results.decode_forward_backward(bytes(result))
        loss += measured["loss:sum"]
        weight += measured["loss_weight:sum"]
        num_tokens += int(measured["loss_weight:sum"])
    evaluation.loss = loss / weight if weight else math.nan
    evaluation.num_tokens = num_tokens
    evaluation.save(update_fields=["loss", "num_tokens"])


def _record(row: Recipe, group: Sequence[Evaluation]) -> None:
    values = {VALIDATION_LOSS: _overall(group)}
    if len(group) > 1:
        values |= {f"{VALIDATION_LOSS}/{one.label}": _loss(one) for one in group}
    body = json.dumps({"step": group[0].step, "metrics": values}, separators=(",", ":"))
    recipe_rows.submit(row, Operation.Kind.RECORD_METRICS, body.encode())


def _note_best(row: Recipe, step: int) -> None:
    losses = _saved_losses(row)
    if best_step(row) == step and row.best_step != step:
        row.best_step = step
        recipe_rows.note_at(row, step, "best", validation_loss=round(losses[step], 6))


def _settle_best(row: Recipe, *, has_saved: bool) -> None:
    """Let another step be the best if weights could not be saved, or only now, or were deleted."""
    if has_saved or (row.best_step is not None and not _has_weights(row, row.best_step)):
        row.best_step = best_step(row)


def _has_weights(row: Recipe, step: int) -> bool:
    """Say whether a step's weights are there, or will be; asked with each step, so the saves to come are read last."""
    names = [recipe_rows.automatic_name(step), *([recipe_rows.FINAL] if step == row.next_step else [])]
    there = Checkpoint.objects.filter(run_id=row.run_id, kind=Checkpoint.Kind.TRAINING, name__in=names)
    return there.exists() or _is_among(recipe_rows.saved_names(row), row, step)


def _saved_losses(recipe: Recipe) -> dict[int, float]:
    """Return the losses of the steps whose weights are there, or will be once they are saved."""
    names = recipe_rows.saved_names(recipe)
    return {
        step: loss
        for step, (loss, is_saved) in overall_losses(recipe).items()
        if is_saved and math.isfinite(loss) and _is_among(names, recipe, step)
    }


def _is_among(names: Collection[str], recipe: Recipe, step: int) -> bool:
    """Say whether one of the names is of a step's weights; `final` are those of the step that was submitted last."""
    has_final = step == recipe.next_step and recipe_rows.FINAL in names
    return has_final or recipe_rows.automatic_name(step) in names


def _overall(group: Sequence[Evaluation]) -> float:
    num_tokens = sum(one.num_tokens for one in group)
    if num_tokens == 0:
        return math.nan
    return sum(_loss(one) * one.num_tokens for one in group) / num_tokens


def _loss(evaluation: Evaluation) -> float:
    return math.nan if evaluation.loss is None else evaluation.loss


def _only_one_counts_slots() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LockClass.RECIPE_SLOTS])
