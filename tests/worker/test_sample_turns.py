"""Many samples of one person do not stand before the few of another, in the worker either."""

from __future__ import annotations

from collections.abc import Callable

from gpuworker.sample_intake import HELD_PER_SLOT
from gpuworker.worker import GpuWorker
from runs.models import Operation, User
from tests.worker.conftest import finished, wait_for
from tests.worker.test_device_share import ask

NUM_SLOTS = 2
MANY = 24
NUM_TOKENS = 40


def test_a_worker_holds_no_more_than_twice_what_it_draws_and_its_engine_no_more_than_that(
    start_worker: Callable[[], GpuWorker], alice: User, base_model: str
) -> None:
    worker = start_worker()
    (engine,) = worker.scheduler._engines.values()
    engine.num_slots = NUM_SLOTS
    held = worker._intake.samples
    with worker.scheduler._draining:
        for _ in range(MANY):
            ask(alice, base_model, num_tokens=NUM_TOKENS)
        wait_for(lambda: held.num_waiting == HELD_PER_SLOT * NUM_SLOTS, what="as many are taken as may be")
        assert not held.take()
        for taken in worker._intake.pop_samples():
            worker.scheduler._desk.admit(taken)
        assert engine.sampler.num_pending == NUM_SLOTS
        assert Operation.objects.filter(worker=None).count() == MANY - HELD_PER_SLOT * NUM_SLOTS
    wait_for(
        lambda: not Operation.objects.filter(state=Operation.State.QUEUED).exists(), what="all are drawn"
    )
    assert not Operation.objects.exclude(state=Operation.State.DONE).exists()


def test_one_sample_of_another_waits_for_what_is_drawn_and_not_for_what_is_held(
    start_worker: Callable[[], GpuWorker], alice: User, base_model: str
) -> None:
    worker = start_worker()
    (engine,) = worker.scheduler._engines.values()
    engine.num_slots = NUM_SLOTS
    with worker.scheduler._draining:
        many = [ask(alice, base_model, num_tokens=NUM_TOKENS) for _ in range(MANY)]
        wait_for(
            lambda: Operation.objects.exclude(worker=None).count() >= 2 * NUM_SLOTS, what="they are taken"
        )
        bob = User.objects.create(username="bob")
        one = ask(bob, base_model, num_tokens=NUM_TOKENS)
    ended_at = finished(one).finished_at
    for number in many:
        finished(number)
    before = Operation.objects.filter(pk__in=many, finished_at__lt=ended_at).count()
    assert before <= 5 * NUM_SLOTS


def test_a_slot_that_is_free_goes_to_the_next_person(
    start_worker: Callable[[], GpuWorker], alice: User, base_model: str
) -> None:
    """Though a request of another is not at its end: of many samples some end long before the last."""
    worker = start_worker()
    (engine,) = worker.scheduler._engines.values()
    desk = worker.scheduler._desk
    with worker.scheduler._draining:
        wide = ask(alice, base_model, num_tokens=200, num_samples=engine.num_slots)
        one = ask(User.objects.create(username="bob"), base_model, num_tokens=3)
        wait_for(lambda: worker._intake.samples.num_waiting == 2, what="both are taken")
        for taken in worker._intake.pop_samples():
            desk.admit(taken)
        desk.step()
        assert engine.sampler.num_pending == 1
        engine.sampler._running.pop()  # as when a sample has ended
        desk.step()
        assert engine.sampler.num_pending == 2
        engine.sampler.cancel(str(wide))
    assert finished(one).state == Operation.State.DONE
