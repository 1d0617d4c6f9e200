"""Rows as work leaves them: for tests of pages, and for the demonstration that `demo` makes of them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.contrib.auth.hashers import make_password
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.utils import timezone
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from runs import ids
from runs.models import (
    BaseModel,
    Checkpoint,
    Metric,
    Operation,
    SamplingSession,
    Session,
    TrainingRun,
    User,
    Worker,
)
from runs.schemas import tinker_pb2 as pb

MODEL = "mintweb/tiny"
START, END = "<|im_start|>", "<|im_end|>"
STORIES = [
    (
        "Tell me a story about a fox.",
        "A fox found a red ball by the river. She rolled it home and shared it with the owl.",
    ),
    ("What colour is the sky at night?", "At night the sky is dark blue, and the stars are white."),
    ("Count from one to five.", "One, two, three, four, five."),
    ("Where does the bear sleep?", "The bear sleeps in a warm cave under the hill until the snow is gone."),
]


def make_user(name: str = "admin", password: str = "") -> User:
    """Return a user, with a password if one is given."""
    user, _ = User.objects.get_or_create(username=name)
    if password:
        user.password = _hashed(password)
    else:
        user.set_unusable_password()
    user.save()
    return user


@lru_cache
def _hashed(password: str) -> str:
    return make_password(password)


def make_tokenizer(folder: Path) -> Tokenizer:
    """Return a small tokenizer and keep it in the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([f"{prompt} {answer}" for prompt, answer in STORIES], trainer)
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def make_base_model(folder: Path, *, error: str = "", worker: Worker | None = None) -> Tokenizer:
    """Enter the tiny model as loaded, and served by the worker, or as failed."""
    tokenizer = make_tokenizer(folder)
    values: dict[str, Any] = {"directory": str(folder), "error": error, "worker": worker}
    if not error:
        values |= {"vocab_size": 602, "max_context": 2048, "max_rank": 64, "num_parameters": 3_412_224}
        values["architecture"] = "LlamaForCausalLM"
        if worker is not None:
            Worker.objects.filter(pk=worker.pk).update(fingerprint={MODEL: {"torch": "2"}})
    BaseModel.objects.update_or_create(name=MODEL, defaults=values)
    return tokenizer


def make_worker(*, is_alive: bool = True, device: str = "cuda:0") -> Worker:
    """Enter a worker."""
    now = timezone.now()
    return Worker.objects.create(
        host="gpu-node-1",
        pid=random.randrange(1000, 30_000),
        device=device,
        dtype="bfloat16",
        started_at=now - timedelta(hours=5),
        lease_until=now + (timedelta(days=30) if is_alive else -timedelta(hours=4)),
        stopped_at=None if is_alive else now - timedelta(hours=4),
        busy_share=0.83 if is_alive else None,
    )


def make_run(user: User, *, name: str = "", session: Session | None = None, **values: Any) -> TrainingRun:
    """Make a run without any operation."""
    session = session or Session.objects.create(
        owner=user, public_id=ids.new_session_id(), sdk_version="0.38.0"
    )
    number = session.training_runs.count()
    defaults: dict[str, Any] = {
        "base_model": MODEL,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_seed": 7,
        "train_attn": True,
        "train_mlp": True,
        "train_unembed": True,
    }
    return TrainingRun.objects.create(
        public_id=ids.run_id(session.public_id, number),
        owner=user,
        session=session,
        model_seq_id=number,
        name=name,
        **{**defaults, **values},
    )


def make_fork(
    user: User, checkpoint: Checkpoint, *, name: str = "fork", with_optimizer: bool = True
) -> TrainingRun:
    """Make a run that was started from a checkpoint and has no state of its own kept yet."""
    parent = checkpoint.run
    run = make_run(
        user,
        name=name,
        parent=parent,
        parent_step=checkpoint.step,
        parent_seq=checkpoint.seq,
        parent_path=str(ids.CheckpointPath(parent.public_id, checkpoint.kind, checkpoint.name)),
        continues_parent=with_optimizer,
    )
    Operation.objects.create(
        owner=user,
        run=run,
        seq=0,
        kind=Operation.Kind.CREATE_MODEL,
        state=Operation.State.DONE,
        loads_from=checkpoint.directory,
    )
    return run


def add_values(
    run: TrainingRun,
    rows: Iterable[tuple[int, int, Mapping[str, float]]],
    *,
    ends_at: datetime | None = None,
    step_s: float = 1.0,
) -> None:
    """Enter metric values, given as (seq, step, {name: value}), and move the run's head along."""
    listed = list(rows)
    end = ends_at or timezone.now()
    Metric.objects.bulk_create(
        (
            Metric(
                run=run,
                seq=seq,
                step=step,
                name=name,
                value=value,
                recorded_at=end - timedelta(seconds=step_s * (len(listed) - 1 - index)),
            )
            for index, (seq, step, values) in enumerate(listed)
            for name, value in values.items()
        ),
        batch_size=5000,
    )
    if not listed:
        return
    seq, step, values = listed[-1]
    run.applied_seq, run.step, run.last_applied_at = seq, step, end
    if math.isfinite(values.get("loss", math.nan)):
        run.loss = values["loss"]
    run.tokens_per_s = values.get("tokens_per_s", run.tokens_per_s)
    run.num_tokens += 2048 * len(listed)
    run.save(update_fields=["applied_seq", "step", "last_applied_at", "loss", "tokens_per_s", "num_tokens"])


def curve(
    num_steps: int,
    *,
    start: float = 3.1,
    floor: float = 0.9,
    seed: int = 0,
    spike_at: Sequence[int] = (),
    nan_at: Sequence[int] = (),
) -> list[tuple[int, int, dict[str, float]]]:
    """Return values as a fine-tuning run has them; every step takes two operations."""
    draw = random.Random(seed)
    rows = []
    for step in range(1, num_steps + 1):
        share = step / num_steps
        loss = (
            floor
            + (start - floor) * math.exp(-5 * share) * (1 + draw.gauss(0, 0.05))
            + abs(draw.gauss(0, 0.05))
        )
        loss += 2.2 if step in spike_at else 0
        rate = 2e-4 * min(step / 30, 1) * (0.5 + 0.5 * math.cos(math.pi * share))
        values = {
            "loss": math.nan if step in nan_at else loss,
            "learning_rate": rate,
            "grad_norm": (6.0 if step in spike_at else 0.4)
            + 1.6 * math.exp(-4 * share)
            + abs(draw.gauss(0, 0.12)),
            "tokens_per_s": 5200 + 300 * math.sin(step / 40) + draw.gauss(0, 160),
            "step_time_s": 0.39 + abs(draw.gauss(0, 0.02)),
        }
        rows.append((2 * step, step, values))
    return rows


def add_operations(run: TrainingRun, *, num_done: int = 16, num_queued: int = 2, error: str = "") -> None:
    """Enter the latest operations of a run."""
    now = timezone.now()
    first = max(run.applied_seq - num_done + 1, 1)
    for index, seq in enumerate(range(first, first + num_done + num_queued)):
        is_done = index < num_done
        is_failed = bool(error) and index == num_done - 1
        sent = now - timedelta(seconds=0.45 * (num_done + num_queued - index))
        Operation.objects.create(
            owner=run.owner,
            run=run,
            seq=seq,
            kind=Operation.Kind.FORWARD_BACKWARD if seq % 2 else Operation.Kind.OPTIM_STEP,
            state=Operation.State.FAILED
            if is_failed
            else Operation.State.DONE
            if is_done
            else Operation.State.QUEUED,
            payload=b"{}",
            payload_digest=f"{run.pk}-{seq}",
            num_tokens=2048 if seq % 2 else 0,
            error=error if is_failed else "",
            error_category="user" if is_failed else "",
            attempts=1 if is_done else 0,
            created_at=sent,
            started_at=sent + timedelta(milliseconds=14 + 3 * index) if is_done else None,
            finished_at=sent + timedelta(milliseconds=260 + 20 * index) if is_done else None,
        )


def add_checkpoint(
    run: TrainingRun,
    name: str,
    *,
    kind: str = "weights",
    step: int | None = None,
    days: int | None = None,
    age_h: float = 1.0,
) -> Checkpoint:
    """Enter a checkpoint with real files."""
    directory = f"checkpoints/{run.pk}/{kind}-{name}"
    for file_name, content in (
        ("adapter_config.json", json.dumps({"r": run.lora_rank}).encode()),
        ("adapter_model.safetensors", bytes(range(256)) * 40),
        ("optimizer.safetensors", b"moments" * 100),
    ):
        default_storage.delete(f"{directory}/{file_name}")
        default_storage.save(f"{directory}/{file_name}", ContentFile(content))
    now = timezone.now()
    return Checkpoint.objects.create(
        owner=run.owner,
        run=run,
        kind=kind,
        name=name,
        directory=directory,
        size_bytes=41_984_120 if kind == "weights" else 14_120_448,
        seq=run.applied_seq,
        step=run.step if step is None else step,
        created_at=now - timedelta(hours=age_h),
        expires_at=None if days is None else now + timedelta(days=days),
    )


def add_sample(
    run: TrainingRun,
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    *,
    checkpoint: Checkpoint | None = None,
    **request: Any,
) -> Operation:
    """Enter a finished sample, as the API stores it."""
    sampling, _ = SamplingSession.objects.get_or_create(
        session=run.session,
        seq_id=checkpoint.pk if checkpoint else 0,
        defaults={
            "public_id": ids.sampling_session_id(run.session.public_id, checkpoint.pk if checkpoint else 0),
            "owner": run.owner,
            "base_model": run.base_model,
            "checkpoint": checkpoint,
            "run": run,
        },
    )
    seq = sampling.operations.count()
    body = {
        "sampling_session_id": sampling.public_id,
        "seq_id": seq,
        "num_samples": len(answers),
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
        "sampling_params": {"max_tokens": 64, "temperature": 0.7},
        **request,
    }
    response = pb.SampleResponse()
    for answer in answers:
        packed = b"".join(token.to_bytes(4, "little") for token in answer)
        response.sequences.add(stop_reason=pb.STOP_REASON_STOP, tokens=packed)
    now = checkpoint.created_at if checkpoint else timezone.now()
    return Operation.objects.create(
        owner=run.owner,
        sampling_session=sampling,
        seq=seq,
        kind=Operation.Kind.SAMPLE,
        state=Operation.State.DONE,
        payload=json.dumps(body).encode(),
        payload_digest=f"sample-{sampling.pk}-{seq}",
        result=response.SerializeToString(),
        result_is_proto=True,
        created_at=now,
        started_at=now,
        finished_at=now,
    )


def chat(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a prompt in a chat's form."""
    text = f"{START}user\n{prompt}{END}\n{START}assistant\n"
    tokens: list[int] = tokenizer.encode(text).ids
    return tokens
