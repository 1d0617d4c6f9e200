"""A worker that is drained finishes, keeps and lets go what it has; the run goes on elsewhere with the same bits."""

from __future__ import annotations

from collections.abc import Callable

from gpuworker.worker import GpuWorker
from runs.models import Operation, RunEvent, TrainingRun, User, Worker
from runs.services import sampling, sessions, waiting, workers
from tests.worker.conftest import LONG_S, MODEL, Client, StartProcess, finished, losses_of, wait_for
from tests.worker.test_placement import tokens_of
from tests.worker.test_streaming import ask

NUM_AHEAD = 4


def train(client: Client, first: int, number: int) -> list[int]:
    """Submit steps and return the operations whose losses tell the weights after each."""
    looks = []
    for step in range(first, first + number):
        client.forward_backward(tokens_of(step))
        client.optim_step()
        looks.append(client.forward_backward(tokens_of(99), forward_only=True))
    return looks


def losses(looks: list[int]) -> list[float]:
    return [losses_of(finished(look, deadline_s=LONG_S)) for look in looks]


def owner_of(client: Client) -> Worker | None:
    return TrainingRun.objects.select_related("worker").get(pk=client.run.pk).worker


def is_drained(worker: Worker) -> bool:
    return workers.state_of(workers.with_state().get(pk=worker.pk)) == "drained"


def test_a_run_whose_worker_is_drained_while_it_trains_goes_on_elsewhere_with_the_same_bits(
    start_process: StartProcess,
    new_client: Callable[..., Client],
) -> None:
    first, second = start_process(), start_process()
    client = new_client()
    looks = train(client, 0, NUM_AHEAD)
    finished(looks[0], deadline_s=LONG_S)
    former = owner_of(client)
    assert former is not None
    workers.drain(former)

    def has_moved() -> bool:
        looks.extend(train(client, len(looks), NUM_AHEAD))
        finished(looks[-NUM_AHEAD], deadline_s=LONG_S)
        return owner_of(client) not in (None, former)

    wait_for(has_moved, what="another worker has the run, whose client never stops", deadline_s=LONG_S)
    undisturbed = new_client()
    assert losses(looks) == losses(train(undisturbed, 0, len(looks)))
    after = owner_of(client)
    assert after is not None
    assert {former.pid, after.pid} == {first.pid, second.pid}
    wait_for(lambda: is_drained(former), what="the worker holds nothing")
    kinds = set(RunEvent.objects.filter(run=client.run).values_list("kind", flat=True))
    assert kinds == {"restored"}  # let go in order: nothing was replayed for want of a state
    assert list(Operation.objects.filter(run=client.run).values_list("attempts", flat=True).distinct()) == [1]

    workers.resume(former)
    workers.drain(after)
    wait_for(lambda: is_drained(after), what="the other worker holds nothing")
    client.optim_step()
    finished(client.forward_backward(tokens_of(99), forward_only=True), deadline_s=LONG_S)
    back = owner_of(client)
    assert back is not None
    assert back.pk == former.pk
    assert first.poll() is second.poll() is None


def test_without_another_worker_everything_waits_and_says_why(
    start_process: StartProcess,
    new_client: Callable[..., Client],
    alice: User,
) -> None:
    start_process()
    client = new_client()
    client.forward_backward(tokens_of(1))
    finished(client.optim_step(), deadline_s=LONG_S)
    only = owner_of(client)
    assert only is not None
    workers.drain(only)
    wait_for(lambda: is_drained(only), what="the worker holds nothing")
    assert owner_of(client) is None

    waits = client.forward_backward(tokens_of(2))
    sample = sample_of(alice)
    operation = Operation.objects.get(pk=waits)
    assert waiting.reason_of(operation) == waiting.ALL_DRAINED
    outlook = workers.outlook()
    assert (MODEL in outlook.stranded, outlook.num_waiting) == (True, 1)
    renewed_until = Worker.objects.get(pk=only.pk).lease_until
    wait_for(
        lambda: Worker.objects.get(pk=only.pk).lease_until > renewed_until, what="the worker is still alive"
    )
    assert not Operation.objects.filter(pk__in=[waits, sample]).exclude(attempts=0).exists()

    workers.resume(only)
    assert finished(waits, deadline_s=LONG_S).state == Operation.State.DONE
    assert finished(sample, deadline_s=LONG_S).state == Operation.State.DONE


def sample_of(user: User, *, max_tokens: int = 4) -> int:
    """Ask the bare base model for some tokens."""
    session = sampling.create_sampling_session(
        sessions.create_session(user), seq_id=0, base_model=MODEL, checkpoint=None
    )
    return ask(session, num_tokens=max_tokens, stream=False)


def test_what_is_computed_when_the_worker_is_drained_is_finished(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client], alice: User
) -> None:
    client, worker = new_client(), start_worker()
    finished(client.forward_backward(tokens_of(1)))
    sample = sample_of(alice, max_tokens=200)
    wait_for(lambda: Operation.objects.get(pk=sample).worker_id, what="the sample is being drawn")
    workers.drain(worker.row)
    assert finished(sample).state == Operation.State.DONE
    wait_for(lambda: is_drained(worker.row), what="the worker holds nothing")
    wait_for(lambda: not worker._intake.seats, what="nothing of it is in memory")
