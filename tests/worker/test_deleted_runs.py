"""A run that is deleted while a worker holds it: nothing of it comes back, and the worker goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from django.core.files.storage import default_storage

from gpuworker import boot
from gpuworker.engine.engine import Engine
from gpuworker.worker import GpuWorker
from runs.models import Checkpoint, Operation, RunEvent, Snapshot, TrainingRun, Worker
from runs.services import run_deletion
from tests.worker.conftest import Client, finished, wait_for

TOKENS = [3, 14, 15, 92, 65]


def files_of(run_pk: int) -> list[Path]:
    folders = [Path(default_storage.path(f"{kind}/{run_pk}")) for kind in ("checkpoints", "snapshots")]
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_the_worker_lets_go_of_it_and_keeps_the_others(
    transactional_db: None, base_model: str, new_client: Callable[..., Client]
) -> None:
    engines: dict[str, Engine] = {}

    def load(row: Worker) -> dict[str, Engine]:
        engines.update(boot.load_engines(row))
        return engines

    worker = GpuWorker(load_engines=load)
    worker.start()
    try:
        client, other = new_client(seed=1), new_client(seed=2)
        for one in (client, other):
            one.forward_backward(TOKENS)
            finished(one.optim_step())
            finished(one.save("kept"))
        run_pk, engine = client.run.pk, engines[base_model]
        assert engine.has_adapter(f"run-{run_pk}")
        assert files_of(run_pk)

        run_deletion.delete(client.run)
        wait_for(lambda: not engine.has_adapter(f"run-{run_pk}"), what="the worker lets go")
        assert finished(other.forward_backward(TOKENS)).state == Operation.State.DONE
    finally:
        worker.stop()  # keeps the state of every run it holds

    assert files_of(run_pk) == []
    assert not TrainingRun.objects.filter(pk=run_pk).exists()
    for model in (Operation, Checkpoint, Snapshot, RunEvent):
        assert set(model.objects.values_list("run_id", flat=True)) <= {other.run.pk}
    assert Snapshot.objects.filter(run=other.run).exists()
