"""The command lines of the processes."""

from __future__ import annotations

import os

import pytest
from pytest_django import Settings

from mintweb import programs


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_each_gpu_has_a_worker_of_its_own(settings: Settings) -> None:
    settings.DEVICE = "auto"
    workers = programs.gpu_workers()
    assert [worker.name for worker in workers] == ["gpu0", "gpu1"]
    assert [worker.env["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["2", "5"]
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {worker.env["OMP_NUM_THREADS"] for worker in workers} == {str(share)}


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_named_device_has_one_worker(settings: Settings, device: str) -> None:
    settings.DEVICE = device
    (worker,) = programs.gpu_workers()
    assert worker.name == "gpu"
    assert "CUDA_VISIBLE_DEVICES" not in worker.env


def test_hidden_gpus_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert programs.visible_gpus() == []


def test_only_the_gpu_worker_serves_the_gpu_queue() -> None:
    serving = [program.name for program in programs.services() if "--queues=gpu" in program.command]
    assert serving == ["gpu"]
    assert [program.name for program in programs.services()] == ["gpu", "web", "cpu", "beat"]
