"""A sample whose workers died is tried with nothing beside it, and given up when it ends its worker even so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from gpuworker.worker import GpuWorker
from runs.models import Operation, SamplingSession
from tests.worker.conftest import Client, Start, finished, wait_for
from tests.worker.test_streaming import ask

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]


def test_a_sample_whose_workers_died_is_tried_with_nothing_beside_it(
    start_worker: Start,
    new_client: Callable[..., Client],
    session: SamplingSession,
) -> None:
    lengths = (100, 200, 5)  # beside each other they would end in another order
    samples = [ask(session, seq=seq, num_tokens=num, stream=False) for seq, num in enumerate(lengths)]
    suspect = samples[1]
    Operation.objects.filter(pk=suspect).update(attempts=2)
    client = new_client()

    start_worker()

    wait_for(lambda: Operation.objects.get(pk=suspect).lone_attempts, what="it is tried alone")
    trained = client.forward_backward(TOKENS)
    for pk in [*samples, trained]:
        finished(pk)
    ended = Operation.objects.filter(pk__in=[*samples, trained]).order_by("finished_at")
    assert list(ended.values_list("pk", flat=True)) == [*samples[:2], trained, samples[2]]
    assert [Operation.objects.get(pk=pk).lone_attempts for pk in samples] == [0, 1, 0]


def test_runs_go_on_between_samples_that_are_tried_alone(
    start_worker: Start,
    new_client: Callable[..., Client],
    session: SamplingSession,
) -> None:
    samples = [ask(session, seq=seq, num_tokens=30, stream=False) for seq in range(4)]
    Operation.objects.filter(pk__in=samples).update(attempts=9)
    client = new_client()
    steps = [client.optim_step() for _ in range(160)]

    start_worker()

    ends = [finished(pk).finished_at for pk in samples]
    stepped = [finished(pk).finished_at for pk in steps]
    for before, after in pairwise(ends):
        assert any(before < at < after for at in stepped if before and at and after)


def test_a_sample_that_ended_two_workers_alone_is_given_up(
    start_worker: Start,
    session: SamplingSession,
) -> None:
    poison, innocent = (ask(session, seq=seq, stream=False) for seq in range(2))
    Operation.objects.filter(pk=poison).update(attempts=4, lone_attempts=2)

    start_worker()

    failed = finished(poison)
    assert (failed.state, failed.error_category) == (Operation.State.FAILED, "server")
    assert failed.error == "given up: it ended its worker 2 times"
    assert finished(innocent).state == Operation.State.DONE


def test_a_sample_outlives_any_number_of_workers_that_end_in_order(
    start_worker: Start,
    session: SamplingSession,
) -> None:
    worker = start_worker()
    worker.scheduler.end_soon()  # takes what comes, but begins nothing
    sample = ask(session, stream=False)
    for _ in range(4):
        wait_for(lambda: Operation.objects.get(pk=sample).attempts == 1, what="the sample is taken")
        worker.stop()
        assert not Operation.objects.exclude(attempts=0, lone_attempts=0, worker=None).exists()
        worker = GpuWorker()
        worker.scheduler.end_soon()
        worker.start()
    worker.stop()

    start_worker()
    assert finished(sample).lone_attempts == 0
