"""Runs that need no code, as their loop leaves them: for tests of pages and for screenshots."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from django.utils import timezone
from tokenizers import Tokenizer

from runs.models import (
    Dataset,
    DatasetVersion,
    Evaluation,
    FixedSample,
    Operation,
    Recipe,
    RunEvent,
    TrainingRun,
    User,
)
from runs.schemas.recipes import SftConfig
from runs.services import operations
from tests.pages import seed

PROMPTS = ["Tell me a story about a fox.", "Where does the bear sleep?"]
ANSWERS = [
    "Once upon a time there was a a a fox fox the the.",
    "Once upon a time there was a fox, and the fox was red.",
    "A fox found a ball by the river, and the fox was glad.",
    "A fox found a red ball by the river. She rolled it home, and the fox was glad.",
    "A fox found a red ball by the river. She rolled it home and shared it with the owl.",
]


def make_dataset(user: User, *, name: str = "pirate answers", number: int = 0x1234) -> DatasetVersion:
    """Enter a dataset whose only version is ready."""
    dataset, _ = Dataset.objects.get_or_create(
        public_id=f"ds-{number + user.pk:012x}", defaults={"owner": user, "name": name}
    )
    version, _ = DatasetVersion.objects.get_or_create(
        dataset=dataset,
        number=1,
        defaults={
            "digest": f"{number:064x}",
            "filename": "rows.jsonl",
            "size_bytes": 120_000,
            "directory": f"datasets/{dataset.public_id}-1",
            "state": DatasetVersion.State.READY,
            "kind": DatasetVersion.Kind.CHAT,
            "num_rows": 1200,
        },
    )
    return version


def make_recipe(
    run: TrainingRun,
    *,
    state: str = Recipe.State.RUNNING,
    prompts: Sequence[str] = PROMPTS,
    num_steps: int = 400,
    started: dict[str, Any] | None = None,
    **values: Any,
) -> Recipe:
    """Make a run one that a recipe trains; `started` is what the settings were at the start, where it differs."""
    version = make_dataset(run.owner)
    config = SftConfig(
        base_model=run.base_model,
        dataset=f"{version.dataset.public_id}@{version.number}",
        num_steps=num_steps,
        learning_rate=2e-4,
        max_length=2048,
        eval_every=40,
        save_every=40,
    ).model_dump(mode="json")
    config["samples"] |= {"prompts": list(prompts), "every": 40}
    now = timezone.now()
    defaults = {
        "preparation": {"num_rows": 1140},
        "progress": 1.0,
        "next_step": run.step,
        "num_steps": num_steps,
        "next_seq": max(operations.next_seq(run), run.applied_seq + 1),
        "watched_seq": run.applied_seq,
        "queued_at": now - timedelta(minutes=20),
        "started_at": now - timedelta(minutes=19),
    }
    return Recipe.objects.create(
        run=run,
        name="sft",
        config=config,
        started_config={**config, **(started or {})},
        dataset_version=version,
        state=state,
        **{**defaults, **values},
    )


def add_evaluations(
    run: TrainingRun,
    steps: Sequence[int],
    *,
    labels: Sequence[str] = (),
    floor: float = 1.0,
    turn: float = 1.0,
) -> None:
    """Enter validation losses after these steps; beyond the share `turn` of them they rise again."""
    draw = random.Random(5)
    last = max(steps)
    rows = []
    for step in steps:
        share = step / max(last, 1)
        loss = floor + 2.0 * math.exp(-4 * share) + 1.4 * max(share - turn, 0) + draw.gauss(0, 0.01)
        values = {"validation_loss": loss}
        for index, label in enumerate(labels):
            values[f"validation_loss/{label}"] = loss * (0.93 + 0.16 * index)
        rows.append((2 * step + 1, step, values))
        Evaluation.objects.create(
            run=run,
            step=step,
            label=labels[0] if labels else "held out",
            first_seq=2 * step + 1,
            last_seq=2 * step + 1,
            loss=loss,
            num_tokens=4000,
            has_checkpoint=step > 0,
        )
    head = (run.applied_seq, run.step, run.last_applied_at, run.loss)
    seed.add_values(run, rows)
    run.applied_seq, run.step, run.last_applied_at, run.loss = head
    run.save(update_fields=["applied_seq", "step", "last_applied_at", "loss"])


def add_fixed_sample(
    run: TrainingRun,
    tokenizer: Tokenizer,
    *,
    step: int | None,
    prompt: str,
    answer: str | None,
    error: str = "",
    is_asked: bool = False,
) -> FixedSample:
    """Enter a fixed sample; without an answer it is still waited for, by the worker once it is asked."""
    operation = None
    if answer is not None:
        operation = seed.add_sample(run, tokenizer.encode(prompt).ids, [tokenizer.encode(answer).ids])
    elif is_asked:
        operation = seed.add_sample(run, tokenizer.encode(prompt).ids, [[1]])
        operation.state, operation.result = Operation.State.QUEUED, None
        operation.save(update_fields=["state", "result"])
    return FixedSample.objects.create(run=run, step=step, prompt=prompt, operation=operation, error=error)


def add_strip(
    run: TrainingRun, tokenizer: Tokenizer, steps: Sequence[int], prompts: Sequence[str] = PROMPTS
) -> None:
    """Enter answers of the base model and after each step; those of the last step are still waited for."""
    for prompt in prompts:
        add_fixed_sample(run, tokenizer, step=None, prompt=prompt, answer="the the of a a Once upon")
        for number, step in enumerate(steps):
            answer = ANSWERS[min(number * len(ANSWERS) // max(len(steps), 1), len(ANSWERS) - 1)]
            is_last = number == len(steps) - 1
            add_fixed_sample(
                run, tokenizer, step=step, prompt=prompt, answer=None if is_last else answer, is_asked=is_last
            )


def add_event(run: TrainingRun, kind: str, step: int, **detail: Any) -> RunEvent:
    """Enter an event of the run."""
    created_at = timezone.now() - timedelta(seconds=max(run.step - step, 0))
    return RunEvent.objects.create(
        run=run, seq=2 * step, step=step, kind=kind, detail=detail, created_at=created_at
    )
