"""How long a run takes from here, by the pace of its newest steps."""

from __future__ import annotations

from datetime import timedelta

from django.db.models import F

from runs.models import Metric, Recipe, User
from runs.services import recipe_status
from tests.pages import recipe_seed, seed


def make(user: User, *, num_done: int) -> Recipe:
    run = seed.make_run(user)
    seed.add_values(run, seed.curve(num_done), step_s=2.0)
    return recipe_seed.make_recipe(run, num_steps=400)


def test_a_pause_does_not_count_as_time_that_steps_take(alice: User) -> None:
    undisturbed = recipe_status.status_of(make(alice, num_done=60))
    recipe = make(alice, num_done=60)
    before = Metric.objects.filter(run=recipe.run, step__lte=55)
    before.update(recorded_at=F("recorded_at") - timedelta(hours=10))

    status = recipe_status.status_of(recipe)

    assert undisturbed.eta_high_s is not None
    assert status.eta_high_s is not None
    assert status.eta_high_s < 2 * undisturbed.eta_high_s


def test_steps_that_are_entered_together_have_a_pace(alice: User) -> None:
    recipe = make(alice, num_done=60)
    times = dict(Metric.objects.filter(run=recipe.run, name="loss").values_list("step", "recorded_at"))
    for step in times:
        together = times[min(step + -step % 10, 60)]
        Metric.objects.filter(run=recipe.run, step=step).update(recorded_at=together)

    high_s = recipe_status.status_of(recipe).eta_high_s

    # 340 steps of 2 s are left, give or take a tenth, and where in ten steps the newest twenty begin.
    assert high_s is not None
    assert 600 < high_s < 900
