"""What the n-th call sweep has found, each as a test of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from django.core.files.storage import default_storage

from gpuworker.engine import checkpoints
from gpuworker.worker import GpuWorker
from runs.models import Checkpoint, Metric, Operation
from tests.worker.conftest import Client, finished

Start = Callable[[], GpuWorker]
NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


def curve(client: Client) -> dict[str, float]:
    """Return what is told of the run's only step, but for how long it took."""
    points = Metric.objects.filter(run=client.run).exclude(name__endswith="_s")
    return dict(points.values_list("name", "value"))


def test_a_step_that_two_workers_shared_has_all_of_its_metrics(
    start_worker: Start, new_client: NewClient
) -> None:
    undisturbed, moved = new_client(), new_client()
    worker = start_worker()
    for client in (undisturbed, moved):
        client.forward_backward(TOKENS)
        accumulated = client.forward_backward(TOKENS[:5])
    finished(undisturbed.optim_step())
    finished(accumulated)
    worker.stop()

    start_worker()

    finished(moved.optim_step())
    assert curve(moved) == curve(undisturbed)
    assert curve(moved)["tokens"] == 15


def test_a_checkpoint_that_cannot_be_read_fails_the_load_as_the_servers_fault(
    start_worker: Start, new_client: NewClient
) -> None:
    start_worker()
    client = new_client()
    finished(client.save("kept"))
    checkpoint = Checkpoint.objects.get(run=client.run)
    file = Path(default_storage.path(checkpoint.directory)) / checkpoints.STATE_FILE
    content = file.read_bytes()
    file.unlink()
    file.mkdir()  # the error of a broken disk cannot be had without one; this is one of the same kind

    refused = finished(client.load(checkpoint.directory, "tinker://kept", optimizer=True))

    assert (refused.state, refused.error_category) == (Operation.State.FAILED, "server")
    assert refused.error == "the checkpoint cannot be read: is a directory"
    file.rmdir()
    file.write_bytes(content)
    assert (
        finished(client.load(checkpoint.directory, "tinker://kept", optimizer=True)).state
        == Operation.State.DONE
    )
