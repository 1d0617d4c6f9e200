"""Makes the rows that tests of services and endpoints start from; each call makes new ones."""

from __future__ import annotations

import itertools
import json
import uuid

from django.core.files.base import ContentFile
from django.core.files.storage import default_storage

from runs.models import (
    Checkpoint,
    Dataset,
    DatasetVersion,
    Operation,
    Recipe,
    SamplingSession,
    TrainingRun,
    User,
    Worker,
)
from runs.services import (
    base_models,
    commits,
    operations,
    playground,
    sampling,
    sessions,
    training_runs,
    workers,
)
from runs.services.base_models import BaseModelInfo
from runs.services.commits import NewCheckpoint, Result
from runs.services.operations import Submission
from runs.services.training_runs import Lora, Start
from tests.services.hand_worker import HandWorker

BASE_MODEL = "mintweb/tiny"
VOCAB_SIZE = 2048
MAX_CONTEXT = 2048
MAX_RANK = 64
FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors")
_numbers = itertools.count(1)


def make_user(name: str) -> User:
    """Make a user with this name and a number."""
    return User.objects.create(username=f"{name}{next(_numbers)}")


def report_base_model(worker: Worker, *, error: str = "") -> None:
    """Let a worker report the shipped base model as loaded and serve it, or report it as not loadable."""
    info = BaseModelInfo(
        name=BASE_MODEL,
        directory="",
        vocab_size=VOCAB_SIZE,
        max_context=MAX_CONTEXT,
        max_rank=MAX_RANK,
        architecture="tiny",
        num_parameters=1000,
        error=error,
    )
    base_models.report(worker, info)
    fingerprints = {} if error else {BASE_MODEL: {"torch": "2"}}
    workers.describe(worker, device="cpu", dtype="float32", fingerprints=fingerprints)


def make_worker() -> Worker:
    """Register a worker that has the shipped base model."""
    worker = workers.register(device="cpu", dtype="float32")
    report_base_model(worker)
    return worker


def make_run(owner: User, *, rank: int = 8) -> TrainingRun:
    """Make a run in a session of its own, with its create_model operation waiting as seq 0."""
    session = sessions.create_session(owner)
    run, _ = training_runs.create_run(session, model_seq_id=0, base_model=BASE_MODEL, lora=Lora(rank=rank))
    return run


def make_fork(checkpoint: Checkpoint, owner: User, *, name: str = "child") -> TrainingRun:
    """Make a run that starts from the checkpoint, which it has still to load."""
    run, _ = training_runs.create_run(
        sessions.create_session(owner),
        model_seq_id=0,
        base_model=BASE_MODEL,
        lora=training_runs.lora_of(checkpoint),
        start=Start(checkpoint=checkpoint, with_optimizer=True),
        name=name,
    )
    return run


def optim_step(run: TrainingRun, seq: int, *, learning_rate: float = 1e-4) -> int:
    """Submit an optimizer step and return the operation's number."""
    content = {"learning_rate": learning_rate}
    return operations.submit(run, Submission(kind=Operation.Kind.OPTIM_STEP, seq=seq, payload=_json(content)))


def make_checkpoint(
    run: TrainingRun,
    name: str = "one",
    *,
    kind: str = Checkpoint.Kind.TRAINING,
    is_public: bool = False,
    folder: str = "",
) -> Checkpoint:
    """Save a checkpoint with files through a worker's commit; `folder` as a worker names it, if that matters."""
    directory = f"checkpoints/{run.pk}/{folder or uuid.uuid4().hex}"
    for file in FILES:
        default_storage.save(f"{directory}/{file}", ContentFile(file.encode()))
    new = NewCheckpoint(kind=kind, name=name, directory=directory, size_bytes=100)
    seq = operations.next_seq(run)
    pk = operations.submit(run, Submission(kind=Operation.Kind.SAVE_WEIGHTS, seq=seq, payload=b"{}"))
    worker = HandWorker()
    worker.finish(pk, Result(body=b"{}"), checkpoint=new)
    workers.stop(worker.row)
    checkpoint = Checkpoint.objects.select_related("run").get(run=run, kind=kind, name=name)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_public=is_public)
    return checkpoint


def make_recipe(run: TrainingRun, *, state: str) -> Recipe:
    """Let a recipe train the run, on a dataset without rows."""
    public_id = f"ds-{next(_numbers):012x}"
    dataset = Dataset.objects.create(owner=run.owner, public_id=public_id, name="rows")
    version = DatasetVersion.objects.create(
        dataset=dataset,
        number=1,
        digest="0" * 64,
        filename="rows.jsonl",
        size_bytes=1,
        directory="datasets/x",
    )
    return Recipe.objects.create(
        run=run, name="sft", config={}, started_config={}, dataset_version=version, state=state
    )


def make_sampling_session(owner: User, checkpoint: Checkpoint | None = None) -> SamplingSession:
    """Open a sampling session on a checkpoint or on the base model."""
    session = sessions.create_session(owner)
    return sampling.create_sampling_session(session, seq_id=0, base_model=BASE_MODEL, checkpoint=checkpoint)


def sample(session: SamplingSession, seq: int) -> int:
    """Submit a sample request and return the operation's number."""
    submission = Submission(kind=Operation.Kind.SAMPLE, seq=seq, payload=_json({"seq_id": seq}))
    return operations.submit_sample(session, submission)


def talk(session: SamplingSession, seq: int = 0) -> int:
    """Ask for a sample as the playground does and return the operation's number."""
    return playground.submit(session, [1, 2], seq=seq, max_tokens=4, temperature=1.0, seed=1, stop_tokens=[])


def answer_sample(operation_pk: int, body: bytes = b"{}") -> None:
    """Store a sample's answer."""
    commits.commit_samples({operation_pk: Result(body=body)})


def _json(content: dict[str, float]) -> bytes:
    return json.dumps(content).encode()
