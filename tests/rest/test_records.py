"""Events, evaluations and fixed samples of a run."""

from __future__ import annotations

import math
from pathlib import Path

from runs.models import Evaluation, TrainingRun
from tests.pages import recipe_seed, seed
from tests.rest.client import Rest
from tests.rest.conftest import TINY


def test_events_come_in_order(alice: Rest, run: TrainingRun) -> None:
    for step, kind in ((0, "started"), (10, "paused"), (10, "resumed")):
        recipe_seed.add_event(run, kind, step, why="test")
    found = list(alice.walk(f"runs/{run.public_id}/events?limit=2"))
    assert [(one["kind"], one["step"]) for one in found] == [("started", 0), ("paused", 10), ("resumed", 10)]
    assert found[0]["detail"] == {"why": "test"}


def test_evaluations_come_by_step(alice: Rest, run: TrainingRun) -> None:
    recipe_seed.add_evaluations(run, [10, 0, 20])
    Evaluation.objects.filter(run=run, step=20).update(loss=math.nan)
    found = list(alice.walk(f"runs/{run.public_id}/evaluations?limit=1"))
    assert [one["step"] for one in found] == [0, 10, 20]
    assert found[0]["loss"] > 1
    assert found[2]["loss"] is None
    assert (found[1]["label"], found[1]["num_tokens"]) == ("held out", 4000)


def test_an_evaluation_has_a_checkpoint_while_its_weights_are_there(alice: Rest, run: TrainingRun) -> None:
    def with_checkpoint() -> list[int]:
        return [
            one["step"] for one in alice.walk(f"runs/{run.public_id}/evaluations") if one["has_checkpoint"]
        ]

    recipe_seed.add_evaluations(run, [10, 20, 30])
    Evaluation.objects.filter(run=run).update(has_checkpoint=True)  # to be saved, as the loop enters it
    assert with_checkpoint() == []
    seed.add_checkpoint(run, "step-10", step=10)
    seed.add_checkpoint(run, "final", step=30)
    seed.add_checkpoint(run, "step-20", step=20, kind="sampler_weights")
    seed.add_checkpoint(seed.make_run(alice.user), "step-20", step=20)
    assert with_checkpoint() == [10, 30]
    alice.done("DELETE", f"runs/{run.public_id}/checkpoints/weights/step-10", status=204)
    assert with_checkpoint() == [30]


def test_fixed_samples_are_texts(alice: Rest, run: TrainingRun, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    recipe_seed.add_fixed_sample(run, tokenizer, step=10, prompt="Who?", answer="A fox <b>ran</b>.")
    recipe_seed.add_fixed_sample(run, tokenizer, step=20, prompt="Who?", answer=None)
    recipe_seed.add_fixed_sample(run, tokenizer, step=30, prompt="Who?", answer=None, error="too long")
    first, second, third = alice.walk(f"runs/{run.public_id}/samples")
    assert (first["state"], first["text"], first["step"]) == ("done", "A fox <b>ran</b>.", 10)
    assert (second["state"], second["text"]) == ("pending", "")
    assert (third["state"], third["error"]) == ("failed", "too long")


def test_samples_of_a_model_that_is_gone_are_tokens(alice: Rest, run: TrainingRun) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    recipe_seed.add_fixed_sample(run, tokenizer, step=10, prompt="Who?", answer="fox")
    TrainingRun.objects.filter(pk=run.pk).update(base_model="gone/away")
    (only,) = alice.walk(f"runs/{run.public_id}/samples")
    assert all(part.isdecimal() for part in only["text"].split())


def test_the_samples_of_the_base_model_come_too(alice: Rest, run: TrainingRun) -> None:
    recipe_seed.add_evaluations(run, [10])
    seed.add_checkpoint(run, "one")
    assert alice.get(f"runs/{run.public_id}/samples")["items"] == []
