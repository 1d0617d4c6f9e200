"""What a few days of work leave, for the screenshots in the documentation.

python -m tests.pages.demo      fills the configured database for the user `admin`
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.utils import timezone
from tokenizers import Tokenizer

from runs.models import RunEvent, TrainingRun, User, Worker
from tests.pages.seed import (
    END,
    STORIES,
    add_checkpoint,
    add_operations,
    add_sample,
    add_values,
    chat,
    curve,
    make_base_model,
    make_run,
    make_user,
    make_worker,
)


def fill(user: User, folder: Path) -> TrainingRun:
    """Make a list of runs in all states; returns the one to look at closely."""
    worker = make_worker()
    make_worker(is_alive=False)
    tokenizer = make_base_model(folder, worker=worker)
    now = timezone.now()
    old: list[tuple[str, int, timedelta, dict[str, Any]]] = [
        ("baseline rank 8", 400, timedelta(days=3), {"state": "closed", "lora_rank": 8}),
        ("chat style, 2 epochs", 1200, timedelta(days=2), {"state": "closed"}),
        ("", 90, timedelta(days=1, hours=3), {"state": "closed", "source": "rest"}),
        (
            "lr sweep 1e-3",
            210,
            timedelta(hours=20),
            {"state": "failed", "error": "the loss is not finite at step 210 (learning rate 0.001)"},
        ),
        ("lr sweep 5e-4", 640, timedelta(hours=16), {"state": "closed"}),
        ("lr sweep 2e-4", 640, timedelta(hours=12), {"state": "closed"}),
        ("stories, browser run", 500, timedelta(hours=7), {"source": "browser", "state": "closed"}),
        ("notebook experiment", 37, timedelta(minutes=50), {}),
    ]
    for index, (name, num_steps, age, values) in enumerate(old):
        run = make_run(user, name=name, created_at=now - age - timedelta(minutes=30), **values)
        add_values(
            run,
            curve(num_steps, seed=index, start=2.8 + 0.1 * index, floor=0.7 + 0.08 * index),
            ends_at=now - age,
        )
    for index, name in enumerate(["dpo-preference-v3", "math word problems"]):
        run = make_run(
            user, name=name, created_at=now - timedelta(minutes=42 - 9 * index), worker=worker, lora_rank=32
        )
        add_values(run, curve(700 + 150 * index, seed=20 + index, start=2.4, floor=0.55), step_s=0.4)
        add_operations(run)
    queued = make_run(user, name="queued behind the others", created_at=now - timedelta(seconds=70))
    add_operations(queued, num_done=0)
    return _main_run(user, worker, tokenizer)


def _main_run(user: User, worker: Worker, tokenizer: Tokenizer) -> TrainingRun:
    now = timezone.now()
    run = make_run(
        user,
        name="story assistant, rank 16",
        created_at=now - timedelta(minutes=31),
        worker=worker,
        user_metadata={"dataset": "stories-v2", "seed": "7"},
    )
    add_values(run, curve(1900, seed=3, spike_at=[702], nan_at=[1210, 1211]), step_s=0.9)
    add_operations(run, error="")
    for step, age_h in ((500, 0.4), (1000, 0.27), (1500, 0.1)):
        add_checkpoint(run, f"step-{step:06d}", step=step, age_h=age_h, days=None if step == 1500 else 7)
    sampler = add_checkpoint(run, "eval-1500", kind="sampler_weights", step=1500, age_h=0.1, days=1)
    for prompt, answer in STORIES:
        ids_of_answer = tokenizer.encode(answer + END).ids
        add_sample(run, chat(tokenizer, prompt), [ids_of_answer], checkpoint=sampler)
    for kind, step, detail in (
        ("recovered", 960, {"from_seq": 1908, "num_replayed": 12, "took_s": 6.4}),
        (
            "diverged",
            1210,
            {"operation": "forward_backward", "seq": 2419, "reason": "its result is another one"},
        ),
        ("saved", 1500, {"checkpoint": "step-001500"}),
    ):
        created_at = now - timedelta(seconds=0.9 * (run.step - step))
        RunEvent.objects.create(
            run=run, seq=2 * step, step=step, kind=kind, detail=detail, created_at=created_at
        )
    return run


if __name__ == "__main__":  # pragma: no cover
    fill(make_user(password="mintweb-demo"), Path(settings.DATA_DIR) / "seed-tokenizer")
