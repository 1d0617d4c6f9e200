"""The loop that trains runs without a client: it submits operations as an SDK client would, some seconds ahead.

All it knows is in rows, so it may be killed at any point; a new one goes on with the next operation.
One turn looks once after every active recipe; `runs.recipes.process` repeats it.
"""

from __future__ import annotations

import logging
import math
import time
from itertools import groupby
from typing import Final

from django.db import Error as DatabaseProblem
from django.db import InterfaceError, OperationalError, connection

from runs.exceptions import BaseModelAway, DiskFull, MintError, RateLimited, RequestInvalid
from runs.models import DatasetVersion, Recipe
from runs.recipes import defaults, materials, rendering, sft
from runs.recipes.materials import Materials
from runs.recipes.sft import Material
from runs.schemas.recipes import MAX_STEPS, SftConfig
from runs.services import (
    active_recipes,
    base_models,
    blobs,
    holdups,
    recipe_rows,
    recipe_samples,
    recipe_steps,
)
from runs.services.holdups import NotSaved
from runs.services.recipe_rows import RunDeleted, State
from runs.services.recipe_steps import NewEvaluation, NewOperation, Step

logger = logging.getLogger(__name__)

# Work in the log beyond what the worker has done: enough that the device never waits for a turn of the loop.
AHEAD_S: Final = 2.0
MIN_AHEAD, MAX_AHEAD = 4, 256
# A run that an error holds up is tried again after so long.
HELD_UP_S: Final = 5.0
# What PostgreSQL calls "program limit exceeded": the same statement never succeeds.
_BEYOND_LIMITS: Final = ("54000", "54001", "54011", "54023")


class RecipeLoop:
    """Looks after the active recipes; holds nothing that a new loop could not find again."""

    def __init__(self) -> None:
        self.materials = Materials()
        self._paces: dict[int, _Pace] = {}
        self._held_until: dict[int, float] = {}

    def turn(self) -> bool:
        """Look once after every recipe that needs it; false when none of them is active."""
        recipes = active_recipes.find()
        self._keep_only(recipes)
        for recipe in recipes:
            if time.monotonic() >= self._held_until.get(recipe.pk, 0.0):
                self._look_after(recipe)
        return any(recipe.state in recipe_rows.ACTIVE for recipe in recipes)

    def _look_after(self, recipe: Recipe) -> None:
        try:
            with blobs.room():
                self._advance(recipe)
            self._let_on(recipe)
        except (OperationalError, InterfaceError) as error:
            if not connection.is_usable():  # the database is away: nothing to do with this recipe
                raise
            self._refused(recipe, error)
        except (DiskFull, RateLimited, BaseModelAway, NotSaved) as error:
            self._hold_up(recipe, error)
        except FileNotFoundError as error:
            _fail(recipe, error)
        except OSError as error:
            self._hold_up(recipe, error)
        except (RunDeleted, Recipe.DoesNotExist):
            logger.info("run %s was deleted meanwhile", recipe.run.public_id)
        except MintError as error:
            _fail(recipe, error)
        except Exception as error:
            logger.exception("run %s cannot go on", recipe.run.public_id)
            _fail_badly(recipe, error)

    def _keep_only(self, recipes: list[Recipe]) -> None:
        """Forget every other recipe."""
        self.materials.keep_only(recipes)
        known = {recipe.pk for recipe in recipes}
        for held in (self._paces, self._held_until):
            for pk in held.keys() - known:
                del held[pk]

    def _refused(self, recipe: Recipe, error: OperationalError | InterfaceError) -> None:
        """Fail what goes beyond a limit of the database; what else it refuses (a deadlock, a full disk) passes."""
        if getattr(error.__cause__, "sqlstate", None) in _BEYOND_LIMITS:
            logger.error("run %s cannot go on", recipe.run.public_id, exc_info=error)
            _fail_badly(recipe, error)
        else:
            self._hold_up(recipe, error)

    def _hold_up(self, recipe: Recipe, error: MintError | OSError | DatabaseProblem) -> None:
        """Try again later what met an error that passes: no run ends for that."""
        logger.warning("run %s is held up: %s", recipe.run.public_id, error)
        self._held_until[recipe.pk] = time.monotonic() + HELD_UP_S
        holdups.enter(recipe.run_id, holdups.reason_for_step(error))

    def _let_on(self, recipe: Recipe) -> None:
        self._held_until.pop(recipe.pk, None)
        if holdups.is_of_step(recipe.run.held_up):
            holdups.clear(recipe.run_id, recipe.run.held_up)

    def _advance(self, recipe: Recipe) -> None:
        if recipe.state == State.PREPARING:
            self._prepare(recipe)
        elif recipe.state == State.QUEUED:
            self._begin(recipe)
        elif recipe.state == State.DISCARDING:
            self._end(recipe)
        elif recipe.state in recipe_rows.ENDED:
            recipe_samples.drop_weights_of_ended(recipe)
        else:
            self._collect(recipe)
            if recipe.state == State.RUNNING:
                self._submit(recipe)
            elif recipe.state in (State.FINISHING, State.STOPPING):
                self._end(recipe)

    # -- before the first step -----------------------------------------------------------------------

    def _prepare(self, recipe: Recipe) -> None:
        material = self.materials.get(recipe)
        if material is None:
            return
        config = SftConfig.model_validate(recipe.config)
        num_epochs = config.num_epochs or defaults.NUM_EPOCHS
        num_steps = config.num_steps or material.plan.num_steps(num_epochs)
        if num_steps > MAX_STEPS:
            raise RequestInvalid(
                f"{num_epochs:g} come to more than {MAX_STEPS} steps, the most that a run has",
                place="num_epochs",
            )
        if num_steps <= recipe.first_step:
            raise RequestInvalid(
                f"{num_steps} is not after step {recipe.first_step}, where the fork starts", place="num_steps"
            )
        info = base_models.get(config.base_model)
        completed = defaults.completed(config, info=info, num_steps=num_steps)
        recipe_steps.prepared(recipe, completed, materials.summary_of(material))

    def _begin(self, recipe: Recipe) -> None:
        """Start or go on once the data is there and a slot is free; only a run that starts is measured first."""
        material = self.materials.get(recipe)
        if material is None or not recipe_rows.has_free_slot():
            return
        first = _before_training(recipe, material) if recipe.started_at is None else Step()
        recipe_steps.begin(recipe, first)

    # -- what the worker did -------------------------------------------------------------------------

    def _collect(self, recipe: Recipe) -> None:
        """Look at results: failures, saves, evaluations and samples."""
        if recipe.run.state == recipe.run.State.FAILED:
            recipe_steps.fail(recipe, recipe.run.error)
        if recipe.run.applied_seq > recipe.watched_seq:
            recipe_steps.watch(recipe)
        for _, group in groupby(recipe_steps.open_evaluations(recipe), key=lambda one: one.step):
            evaluations = list(group)
            if evaluations[-1].last_seq <= recipe.run.applied_seq:
                recipe_steps.close_evaluations(recipe, evaluations)
        self._ask_samples(recipe)
        recipe.refresh_from_db(fields=["state", "next_seq", "next_step", "best_step", "config", "num_steps"])
        recipe_steps.prune(recipe, keep=SftConfig.model_validate(recipe.config).keep_checkpoints)

    def _ask_samples(self, recipe: Recipe) -> None:
        waiting = recipe_samples.unasked(recipe)
        if waiting:
            config = SftConfig.model_validate(recipe.config)
            renderer = rendering.renderer_of(config.base_model)
            is_chat = recipe.dataset_version.kind == DatasetVersion.Kind.CHAT
            for sample in waiting:
                prompt = renderer.prompt(sample.prompt, as_chat=is_chat)
                recipe_samples.ask(recipe, sample, prompt=prompt, config=config)
        recipe_samples.drop_weights(recipe)

    # -- the next steps ------------------------------------------------------------------------------

    def _submit(self, recipe: Recipe) -> None:
        """Submit steps until the worker has enough ahead of it."""
        material = self.materials.get(recipe)
        if material is None or self._stops_early(recipe):
            return
        pace = self._paces.setdefault(recipe.pk, _Pace())
        target = pace.ahead(recipe.run.applied_seq)
        while recipe.next_seq - 1 - recipe.run.applied_seq < target and recipe.state == State.RUNNING:
            if self._waits_for_validation(recipe):
                return
            if not recipe_steps.submit_step(recipe, _step(recipe, material)):
                return
            recipe.refresh_from_db(fields=["state", "next_seq", "next_step"])

    def _waits_for_validation(self, recipe: Recipe) -> bool:
        """Say whether early stopping may end the run before the next step; no step is then done in vain."""
        return recipe.config["early_stopping"] is not None and bool(recipe_steps.open_evaluations(recipe))

    def _stops_early(self, recipe: Recipe) -> bool:
        patience = recipe.config["early_stopping"]
        if patience is None or self._waits_for_validation(recipe):
            return False
        losses = {step: loss for step, (loss, _) in recipe_steps.overall_losses(recipe).items()}
        finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            return False
        best_step = min(finite, key=finite.__getitem__)
        # Who extends a run that was ended like this wants to see what comes after.
        since = max(best_step, recipe_steps.extended_at(recipe))
        if sum(step > since for step in losses) < patience:
            return False
        recipe_steps.finish_early(recipe, best_step=best_step, patience=patience)
        return True

    # -- the end -------------------------------------------------------------------------------------

    def _end(self, recipe: Recipe) -> None:
        """Enter the end once everything submitted is done."""
        if _waits_for_worker(recipe) or self._saves_again(recipe):
            return
        if holdups.is_of_save(recipe.run.held_up):
            holdups.clear(recipe.run_id, recipe.run.held_up)
        if recipe.state == State.DISCARDING:
            recipe_steps.delete_weights(recipe)
            recipe_steps.end(recipe, State.DISCARDED)
        elif recipe.state == State.STOPPING:
            recipe_steps.end(recipe, State.STOPPED)
        elif not recipe_steps.open_evaluations(recipe) and not recipe_samples.has_open(recipe):
            recipe_samples.drop_weights(recipe)
            recipe_steps.end(recipe, State.FINISHED)
        self._paces.pop(recipe.pk, None)

    def _saves_again(self, recipe: Recipe) -> bool:
        """Say whether the last weights are saved once more: the server could not, and they are why the run was trained."""
        failed = None if recipe.state == State.DISCARDING else recipe_steps.failed_final(recipe)
        if failed is None:
            return False
        if not recipe_steps.save_again(recipe, failed, after_s=HELD_UP_S):
            raise NotSaved(failed.error)
        return True


def _waits_for_worker(recipe: Recipe) -> bool:
    """Say whether something submitted is still to be done.

    Of a run that never started the creation alone is nothing, nor is letting go of it: no weights come of them.
    """
    untouched_seq = 2 if recipe.state == State.DISCARDING else 1
    is_untouched = recipe.started_at is None and recipe.next_seq == untouched_seq
    is_behind = recipe.run.applied_seq < recipe.next_seq - 1 and recipe.run.state == recipe.run.State.OPEN
    return is_behind and not is_untouched


def _fail(recipe: Recipe, error: MintError | OSError) -> None:
    logger.warning("run %s cannot go on: %s", recipe.run.public_id, error)
    recipe_steps.fail(recipe, str(error))


def _fail_badly(recipe: Recipe, error: Exception) -> None:
    recipe_steps.fail(recipe, f"the server failed: {type(error).__name__}")


def _before_training(recipe: Recipe, material: Material) -> Step:
    """Return what is due before the first step."""
    config = SftConfig.model_validate(recipe.config)
    return Step(evaluations=_evaluations(recipe, material, recipe.next_seq), prompts=config.samples.prompts)


def _step(recipe: Recipe, material: Material) -> Step:
    """Return the next step's operations and what is due after it."""
    config = SftConfig.model_validate(recipe.config)
    operations = sft.train_step(
        material, config, step=recipe.next_step, model_id=recipe.run.public_id, seq=recipe.next_seq
    )
    number = recipe.next_step + 1
    is_last = number >= recipe.num_steps
    is_saved = number % (config.save_every or number) == 0 and not is_last
    is_looked_at = is_last or is_saved or number % (config.eval_every or number) == 0
    is_sampled = is_last or number % defaults.samples_every(config.samples, config) == 0
    first_seq = recipe.next_seq + len(operations)
    return Step(
        operations=operations,
        evaluations=_evaluations(recipe, material, first_seq) if is_looked_at else (),
        save=is_saved,
        is_last=is_last,
        prompts=config.samples.prompts if is_sampled else (),
    )


def _evaluations(recipe: Recipe, material: Material, first_seq: int) -> list[NewEvaluation]:
    evaluations = []
    for held_out in material.held_out:
        forwards: list[NewOperation] = list(
            sft.validation_forwards(held_out, model_id=recipe.run.public_id, first_seq=first_seq)
        )
        evaluations.append(NewEvaluation(label=held_out.label, forwards=forwards))
        first_seq += len(forwards)
    return evaluations


class _Pace:
    """How fast the worker goes through a run's operations."""

    def __init__(self) -> None:
        self._seen: tuple[float, int] | None = None
        self._per_s = 0.0

    def ahead(self, applied_seq: int) -> int:
        """Return how many operations should wait in the log."""
        now = time.monotonic()
        if self._seen is None or now - self._seen[0] >= AHEAD_S:
            if self._seen is not None:
                self._per_s = (applied_seq - self._seen[1]) / (now - self._seen[0])
            self._seen = (now, applied_seq)
        return min(max(MIN_AHEAD, math.ceil(AHEAD_S * self._per_s)), MAX_AHEAD)
