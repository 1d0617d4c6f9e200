"""Whose turn it is: runs that fill the budget go round, and training that comes while a sample runs shares at once."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import pytest
import torch

from gpuworker import scheduler, tasks, turns
from gpuworker.intake import Intake
from gpuworker.scheduler import Scheduler
from gpuworker.seats import Seat
from gpuworker.worker import GpuWorker
from runs.models import Operation, User
from tests.torch_calls import TorchCalls
from tests.worker.conftest import Client, finished, wait_for
from tests.worker.test_device_share import TOKENS, ask

NUM_RUNS = 6
NUM_MIB = 256


def test_runs_that_fill_the_budget_take_turns(
    start_worker: Callable[[], GpuWorker],
    new_client: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "CYCLE_TOKENS", len(TOKENS))
    worker = start_worker()
    with worker.scheduler._draining:
        clients = [new_client(seed=seed) for seed in range(NUM_RUNS)]
        for client in clients:
            for _ in range(5):
                client.forward_backward(TOKENS)
        seats = worker._intake.seats
        wait_for(
            lambda: len(seats) == NUM_RUNS and all(len(seat.queue) == 6 for seat in list(seats.values())),
            what="everything is decoded",
        )
        while not all(seat.is_restored for seat in seats.values()):
            assert worker.scheduler._cycle()
        before = {pk: seat.applied_seq for pk, seat in seats.items()}
        for _ in range(NUM_RUNS):
            assert worker.scheduler._cycle()
        assert [seat.applied_seq - before[pk] for pk, seat in seats.items()] == [1] * NUM_RUNS


def test_the_steps_of_all_runs_go_through_the_engine_together(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client]
) -> None:
    worker = start_worker()
    clients = [new_client(seed=seed) for seed in range(NUM_RUNS)]
    for client in clients:
        finished(client.forward_backward(TOKENS))
    seats = worker._intake.seats
    with worker.scheduler._draining:
        steps = [client.optim_step() for client in clients]
        wait_for(lambda: all(len(seat.queue) == 1 for seat in list(seats.values())), what="all are decoded")
        with TorchCalls() as calls:
            assert worker.scheduler._cycle()
        assert not any(seat.queue for seat in seats.values())
    assert calls.names.count("_fused_adamw_") == 1
    assert all(finished(step).state == Operation.State.DONE for step in steps)


def test_the_end_can_be_asked_for_in_a_signal_handler(
    start_worker: Callable[[], GpuWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It interrupts a thread that may be inside any event."""
    worker = start_worker()
    monkeypatch.setattr(tasks, "_worker", worker)
    drive, held = worker.scheduler, worker._intake
    events = [value for one in (drive, held) for value in vars(one).values() if isinstance(value, Event)]
    assert held.ready in events

    handler = threading.Thread(target=tasks.begin_to_stop)
    with drive._draining, ExitStack() as inside:
        for event in events:
            inside.enter_context(event._cond)  # type: ignore[attr-defined]
        handler.start()
        wait_for(lambda: not handler.is_alive(), what="the handler returns")
    drive.drain(idle_s=60.0, slice_s=60.0)
    assert drive._is_stopping


def test_training_that_comes_while_a_sample_runs_owes_it_nothing(
    start_worker: Callable[[], GpuWorker], alice: User, base_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker()
    intake, drive = worker._intake, worker.scheduler
    step, has_owed = drive._desk.step, threading.Event()

    def step_until_it_owes() -> None:
        step()
        if drive._share._owed_to_sampling_s < -0.01:
            has_owed.set()
            intake.ready.set()  # something to train is there

    monkeypatch.setattr(drive._desk, "step", step_until_it_owes)
    with drive._draining:
        sample = ask(alice, base_model, num_tokens=240)
        wait_for(lambda: intake.samples.num_waiting, what="the sample is taken")
        while not has_owed.is_set():
            intake.ready.clear()
            drive._work()
        assert drive.has_work
        assert Operation.objects.get(pk=sample).state == Operation.State.QUEUED
        drive._share.note_cycle(1e-6)
        assert drive._share.is_samplings_turn


def test_compute_looks_for_work_while_intake_adds_runs(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client]
) -> None:
    worker = start_worker()
    client = new_client()
    seat: Seat = wait_for(lambda: worker._intake.seats.get(client.run.pk), what="the run is claimed")
    intake = Intake(worker.row, {})
    drive = Scheduler({}, intake, worker._committer, release=worker._release, busy=worker._busy)
    done, failures = threading.Event(), list[RuntimeError]()

    def look() -> None:
        while not done.is_set():
            try:
                drive.has_work  # noqa: B018 - what it finds does not matter here
            except RuntimeError as error:
                failures.append(error)

    empty = Seat(seat.run, seat.engine)
    interval, thread = sys.getswitchinterval(), threading.Thread(target=look)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for pk in range(50_000):
            intake.seats[pk] = empty
            if pk % 500 == 499:
                intake.seats.clear()
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not failures


def test_a_worker_at_rest_returns_the_memory_that_it_kept(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker()
    finished(new_client().forward_backward(TOKENS))
    wait_for(lambda: not worker.scheduler.is_draining, what="the worker is idle")
    for _ in range(8):  # so that some lie where the allocator has been before
        torch.ones(NUM_MIB << 18)
    kept_mib = resident_mib()
    monkeypatch.setattr(scheduler, "_HOUSEKEEPING_S", 0.0)
    worker.scheduler.tidy()
    assert resident_mib() > kept_mib - NUM_MIB // 2, "it has not rested yet"
    monkeypatch.setattr(scheduler, "REST_S", 0.0)
    worker.scheduler.tidy()
    assert resident_mib() < kept_mib - NUM_MIB // 2


def resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20
