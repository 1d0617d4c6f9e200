"""The fixed prompts of a recipe: when they are asked, of which weights, and when those weights go.

Weights are saved for such samples only. Both sides of `recipe_rows` use this: the loop, and whoever changes prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from django.db.models import Q

from runs import ids
from runs.models import Checkpoint, FixedSample, Operation, Recipe, SamplingSession
from runs.schemas import requests
from runs.schemas import sampling as schemas
from runs.schemas.recipes import SftConfig
from runs.services import checkpoints, operations, recipe_rows, sampling
from runs.services.operations import Submission

_UNASKED: Final = Q(operation=None, error="")
_OPEN: Final = _UNASKED | Q(operation__state=Operation.State.QUEUED)
_GIVEN_UP: Final = "the run ended before this was asked"


def save(row: Recipe, prompts: Sequence[str]) -> None:
    """Save the weights for a sampling session whose number is the save's own seq, so never used before."""
    seq = row.next_seq
    body = requests.SaveWeightsForSampler(model_id=row.run.public_id, seq_id=seq, sampling_session_seq_id=seq)
    recipe_rows.submit(row, Operation.Kind.SAVE_WEIGHTS_FOR_SAMPLER, requests.canonical_json(body))
    for prompt in prompts:
        FixedSample.objects.update_or_create(
            run_id=row.run_id,
            step=row.next_step,
            prompt=prompt,
            defaults={"save_seq": seq, "operation": None, "error": ""},
        )


def ask_base_model(row: Recipe, prompts: Sequence[str]) -> None:
    """Have the bare base model answer prompts that it has not answered yet."""
    for prompt in prompts:
        FixedSample.objects.get_or_create(run_id=row.run_id, step=None, prompt=prompt)


def unasked(recipe: Recipe) -> list[FixedSample]:
    """Return the samples whose weights are saved and that are not asked for yet."""
    ready = Q(save_seq=None) | Q(save_seq__lte=recipe.run.applied_seq)
    return list(FixedSample.objects.filter(ready, _UNASKED, run_id=recipe.run_id))


def has_open(recipe: Recipe) -> bool:
    """Say whether samples of the recipe are still to be drawn."""
    return FixedSample.objects.filter(_OPEN, run_id=recipe.run_id).exists()


def ask(recipe: Recipe, sample: FixedSample, *, prompt: Iterable[int], config: SftConfig) -> None:
    """Submit a fixed sample; asking twice is the same request."""
    session = _sampling_session(recipe, sample)
    if session is None:
        FixedSample.objects.filter(pk=sample.pk).update(error="the weights of this step could not be saved")
        return
    number = _place(sample)
    settings = config.samples
    body = schemas.Sample.model_validate(
        {
            "sampling_session_id": session.public_id,
            "seq_id": number,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
            "sampling_params": {
                "max_tokens": settings.max_tokens,
                "temperature": settings.temperature,
                "seed": settings.seed + number,
            },
        }
    )
    submission = Submission(kind=Operation.Kind.SAMPLE, seq=number, payload=requests.canonical_json(body))
    FixedSample.objects.filter(pk=sample.pk).update(operation=operations.submit_sample(session, submission))


def drop_weights(recipe: Recipe) -> None:
    """Delete the weights that were saved for samples only, unless a sample is still to be drawn from them.

    Only what the recipe itself has submitted, so what lies before `next_seq`: weights whose samples were drawn
    again from others are needed no more, those that a client saved are the client's.
    """
    needed = FixedSample.objects.filter(_OPEN, run_id=recipe.run_id, save_seq__isnull=False)
    saved = Checkpoint.objects.filter(run_id=recipe.run_id, is_ephemeral=True, seq__lt=recipe.next_seq)
    over = list(saved.exclude(seq__in=needed.values("save_seq")))
    if over:
        checkpoints.delete(*over)


def drop_weights_of_ended(recipe: Recipe) -> None:
    """Delete the weights that an ended recipe has left; a sample that nobody asks for any more is given up."""
    left = FixedSample.objects.filter(_UNASKED, run_id=recipe.run_id, save_seq__isnull=False)
    if left.exists():
        with recipe_rows.locked(recipe) as row:
            if row.state in recipe_rows.ENDED:
                left.update(error=_GIVEN_UP)
    drop_weights(recipe)


def give_up_unasked(row: Recipe) -> None:
    """Give up the samples of a recipe that ends, but for those whose weights are there (see `drop_weights_of_ended`)."""
    saved = Checkpoint.objects.filter(run_id=row.run_id, is_ephemeral=True)
    unasked = FixedSample.objects.filter(_UNASKED, run_id=row.run_id)
    unasked.exclude(save_seq__in=saved.values("seq")).update(error=_GIVEN_UP)


def ask_base_model_again(row: Recipe) -> None:
    """Have the base model answer what was given up at the end of a run that goes on."""
    FixedSample.objects.filter(run_id=row.run_id, step=None, operation=None).update(error="")


def forget_unasked(row: Recipe, *, after_step: int) -> None:
    """Forget the samples of later steps that have no answer to come: a retry saves and asks them anew.

    Their weights are then nobody's, so `drop_weights` deletes them.
    """
    FixedSample.objects.filter(run_id=row.run_id, step__gt=after_step, operation=None).delete()


def _place(sample: FixedSample) -> int:
    """Return the sample's place among those of its weights: the prompts of the settings may be others by now."""
    same = FixedSample.objects.filter(run_id=sample.run_id, save_seq=sample.save_seq)
    return same.filter(pk__lt=sample.pk).count()


def _sampling_session(recipe: Recipe, sample: FixedSample) -> SamplingSession | None:
    session = recipe.run.session
    if sample.save_seq is None:
        return sampling.create_sampling_session(
            session, seq_id=0, base_model=recipe.run.base_model, checkpoint=None
        )
    public_id = ids.sampling_session_id(session.public_id, sample.save_seq)
    return SamplingSession.objects.filter(public_id=public_id).first()
