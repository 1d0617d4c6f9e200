"""What the engine did not expect: the guilty operation fails alone, and a device that is lost takes none with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch

from gpuworker import residents
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import EngineError
from gpuworker.engine.memory import is_device_lost
from gpuworker.engine.sampling import SampleOutcome
from gpuworker.engine.sequences import Group
from gpuworker.engine.types import ForwardBackward, ForwardBackwardResult, SampleRequest
from gpuworker.worker import GpuWorker
from runs.models import Operation, TrainingRun, User
from runs.services import restores
from tests.worker.conftest import Client, Start, finished, losses_of, wait_for
from tests.worker.test_device_share import TOKENS, ask

NewClient = Callable[..., Client]
BAD_TOKEN = 77
FAULT = "CUDA error: an illegal memory access was encountered"


class ProcessEnded(BaseException):
    """The process would be gone."""


def engine_of(worker: GpuWorker) -> Engine:
    (engine,) = worker.scheduler._engines.values()
    return engine


def fail_after_bad_data(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have a pass with the bad token fail after everything was computed; returns the sizes of the passes."""
    compute, sizes = engine.forward_backward, list[int]()

    def compute_and_fail(jobs: Sequence[ForwardBackward]) -> list[ForwardBackwardResult | EngineError]:
        sizes.append(len(jobs))
        answers = compute(jobs)
        if any(BAD_TOKEN in datum.tokens for job in jobs for datum in job.data):
            raise RuntimeError("a shape does not fit")
        return answers

    monkeypatch.setattr(engine, "forward_backward", compute_and_fail)
    return sizes


def test_of_operations_that_failed_together_only_the_guilty_one_fails(
    start_worker: Start, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker()
    guilty, innocent, undisturbed = (new_client() for _ in range(3))
    for client in (guilty, innocent, undisturbed):
        finished(client.forward_backward(TOKENS))
    seats = worker._intake.seats
    sizes = fail_after_bad_data(engine_of(worker), monkeypatch)
    with worker.scheduler._draining:
        bad, good = guilty.forward_backward([BAD_TOKEN, *TOKENS]), innocent.forward_backward(TOKENS)
        wait_for(lambda: all(seats[one.run.pk].queue for one in (guilty, innocent)), what="both are decoded")
    assert finished(good).state == Operation.State.DONE
    assert finished(bad).error == "the engine failed: RuntimeError"
    assert sizes[0] == 2

    undisturbed.forward_backward(TOKENS)
    for client in (innocent, undisturbed):
        client.optim_step()
    losses = [losses_of(finished(one.forward_backward(TOKENS))) for one in (innocent, undisturbed)]
    assert losses[0] == losses[1]
    assert finished(guilty.forward_backward(TOKENS)).state == Operation.State.DONE


def end_with_an_exception(status: int) -> None:
    assert status == 3
    raise ProcessEnded


def test_a_lost_device_ends_the_process_before_anything_is_answered(
    start_worker: Start, new_client: NewClient
) -> None:
    worker = start_worker()
    clients = [new_client(seed=seed) for seed in range(2)]
    for client in clients:
        finished(client.forward_backward(TOKENS))
    seats = worker._intake.seats

    def fault(*_: object) -> None:
        raise torch.AcceleratorError(FAULT)

    with worker.scheduler._draining, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_of(worker), "forward_backward", fault)
        patch.setattr(os, "_exit", end_with_an_exception)
        waiting = [client.forward_backward(TOKENS) for client in clients]
        wait_for(lambda: all(seats[one.run.pk].queue for one in clients), what="both are decoded")
        with pytest.raises(ProcessEnded):
            worker.scheduler._cycle()
        worker._committer.flush()
        assert Operation.objects.filter(pk__in=waiting, state=Operation.State.QUEUED).count() == 2
    assert all(finished(pk).state == Operation.State.DONE for pk in waiting)
    assert not TrainingRun.objects.exclude(fence=1).exists()


def test_a_device_lost_over_samples_ends_the_process_before_they_are_answered(
    start_worker: Start, alice: User, base_model: str
) -> None:
    worker = start_worker()
    held, engine = worker._intake.samples, engine_of(worker)

    def fault() -> None:
        raise RuntimeError(FAULT)

    with worker.scheduler._draining, pytest.MonkeyPatch.context() as patch:
        sample = ask(alice, base_model, num_tokens=5)
        wait_for(lambda: held.num_waiting, what="it is taken")
        patch.setattr(engine.sampler, "step", fault)
        patch.setattr(os, "_exit", end_with_an_exception)
        worker._intake.ready.clear()
        with pytest.raises(ProcessEnded):
            worker.scheduler._work()
        worker._committer.flush()
        assert Operation.objects.get(pk=sample).state == Operation.State.QUEUED
    assert finished(sample).state == Operation.State.DONE


def fail_while_bad_prompt_is_drawn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have every step fail while a prompt with the bad token is in progress; returns how many are, each time."""
    sampler, bad, sizes = engine.sampler, set[str](), list[int]()
    submit, step, cancel = sampler.submit, sampler.step, sampler.cancel

    def submit_and_note(request: SampleRequest) -> None:
        if BAD_TOKEN in request.prompt:
            bad.add(request.request_id)
        submit(request)

    def step_or_fail() -> list[SampleOutcome]:
        if bad:
            sizes.append(sampler.num_pending)
            raise RuntimeError("a shape does not fit")
        return step()

    def cancel_and_note(request_id: str) -> bool:
        bad.discard(request_id)
        return cancel(request_id)

    monkeypatch.setattr(sampler, "submit", submit_and_note)
    monkeypatch.setattr(sampler, "step", step_or_fail)
    monkeypatch.setattr(sampler, "cancel", cancel_and_note)
    return sizes


def test_of_samples_that_failed_together_only_the_guilty_one_fails(
    start_worker: Start, new_client: NewClient, alice: User, base_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker()
    undisturbed = finished(ask(alice, base_model, num_tokens=5)).result
    sizes = fail_while_bad_prompt_is_drawn(engine_of(worker), monkeypatch)
    with worker.scheduler._draining:
        before, bad, after = (
            ask(alice, base_model, num_tokens=5, prompt=prompt)
            for prompt in ((1, 2, 3), (1, BAD_TOKEN), (1, 2, 3))
        )
        wait_for(lambda: worker._intake.samples.num_waiting == 3, what="all are taken")
    assert finished(bad).error == "the engine failed: RuntimeError"
    assert [finished(pk).state for pk in (before, after)] == [Operation.State.DONE] * 2
    assert [finished(pk).result for pk in (before, after)] == [undisturbed] * 2
    assert sizes == [3, 1]
    assert finished(new_client().forward_backward(TOKENS)).state == Operation.State.DONE


def test_samples_without_memory_for_all_are_drawn_one_by_one(
    start_worker: Start, alice: User, base_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker()
    undisturbed = finished(ask(alice, base_model, num_tokens=5)).result
    sampler, sizes = engine_of(worker).sampler, list[int]()
    advance = sampler._advance

    def advance_alone(groups: list[Group]) -> list[SampleOutcome]:
        sizes.append(sum(map(len, groups)))
        if sizes[-1] > 1:
            torch.empty(2**50)  # the allocator really refuses
        return advance(groups)

    monkeypatch.setattr(sampler, "_advance", advance_alone)
    with worker.scheduler._draining:
        samples = [ask(alice, base_model, num_tokens=5) for _ in range(3)]
        wait_for(lambda: worker._intake.samples.num_waiting == 3, what="all are taken")
    assert [finished(pk).result for pk in samples] == [undisturbed] * 3
    assert sizes[0] > 1
    assert set(sizes[1:]) == {1}


def test_a_device_lost_over_a_run_that_is_brought_back_counts_as_a_try(
    start_worker: Start, new_client: NewClient
) -> None:
    worker, client = start_worker(), new_client()
    finished(client.forward_backward(TOKENS))

    def fault(*_: object, **__: object) -> None:
        raise torch.AcceleratorError(FAULT)

    with worker.scheduler._draining, pytest.MonkeyPatch.context() as patch:
        seat = worker._intake.seats[client.run.pk]
        patch.setattr(residents, "restore", fault)
        patch.setattr(os, "_exit", end_with_an_exception)
        patch.setattr(restores, "end", lambda _: None)  # a process that has ended does nothing more
        with pytest.raises(ProcessEnded):
            worker.scheduler._residents._restore(seat)
    assert TrainingRun.objects.get(pk=client.run.pk).restore_tries == 1


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.AcceleratorError(FAULT), True),
        (RuntimeError(FAULT), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("shapes do not fit"), False),
        (ValueError(FAULT), False),
    ],
)
def test_what_a_lost_device_is_told_by(error: Exception, is_lost: bool) -> None:
    assert is_device_lost(error) is is_lost
