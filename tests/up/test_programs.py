"""The command lines of the processes, and what supervisord makes of them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured
from pytest_django import Settings
from supervisor.options import ServerOptions

from mintweb import programs
from mintweb.celery import app


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


def test_each_named_device_gets_a_worker(settings: Settings) -> None:
    settings.DEVICES = ["cpu", "cuda:1"]
    workers = programs.gpu_workers()
    assert [worker.name for worker in workers] == ["gpu0", "gpu1"]
    assert [worker.env["MINTWEB_DEVICE"] for worker in workers] == ["cpu", "cuda:1"]
    assert {worker.env["MINTWEB_NUM_LOCAL_WORKERS"] for worker in workers} == {"2"}


def test_a_group_has_one_worker_for_several_named_devices(settings: Settings) -> None:
    settings.DEVICES, settings.TENSOR_PARALLEL = ["cuda:2", "cuda:3", "cuda:0", "cuda:1"], 2
    workers = programs.gpu_workers()
    assert [worker.name for worker in workers] == ["gpu0", "gpu1"]
    assert [worker.env["MINTWEB_DEVICES"] for worker in workers] == ["cuda:2,cuda:3", "cuda:0,cuda:1"]
    assert [worker.env["MINTWEB_DEVICE"] for worker in workers] == ["cuda:2", "cuda:0"]
    assert {worker.env["MINTWEB_NUM_LOCAL_WORKERS"] for worker in workers} == {"4"}


def test_groups_are_made_of_the_visible_gpus_in_their_order(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,1,3,4,5")
    settings.DEVICE, settings.TENSOR_PARALLEL = "auto", 2
    assert [worker.env["MINTWEB_DEVICES"] for worker in programs.gpu_workers()] == [
        "cuda:0,cuda:1",
        "cuda:2,cuda:3",
    ]
    settings.TENSOR_PARALLEL = 8
    with pytest.raises(ImproperlyConfigured, match="MINTWEB_TENSOR_PARALLEL is 8, but only 5 GPUs"):
        programs.gpu_workers()


def test_only_the_gpu_worker_serves_the_gpu_queue() -> None:
    serving = [program.name for program in programs.services() if "--queues=gpu" in program.command]
    assert serving == ["gpu"]
    assert [program.name for program in programs.services()] == ["gpu", "web", "recipes", "cpu", "beat"]


def test_each_task_of_the_clock_has_a_queue_of_its_own_that_the_cpu_worker_serves() -> None:
    (queues,) = [part for part in programs.cpu_worker().command if part.startswith("--queues=")]
    served = queues.removeprefix("--queues=").split(",")
    tasks = [entry["task"] for entry in app.conf.beat_schedule.values()]
    used = [app.amqp.router.route({}, task)["queue"].name for task in tasks]
    assert {*used} < {*served}
    assert len({*used, app.conf.task_default_queue}) == len(tasks) + 1


def test_only_behind_a_proxy_is_a_client_s_address_taken_from_a_header(settings: Settings) -> None:
    settings.PUBLIC_URL = ""
    assert "--no-proxy-headers" in programs.web().command
    settings.PUBLIC_URL = "https://mint.example.org"
    command = programs.web().command
    assert "--no-proxy-headers" not in command
    assert command[command.index("--forwarded-allow-ips") + 1] == "127.0.0.1"


def test_large_bodies_wait_in_the_folder_of_the_data(settings: Settings) -> None:
    assert programs.web().command[:2] == ("env", f"TMPDIR={settings.TEMP_DIR}")


def test_supervisord_reads_each_command_as_it_is(settings: Settings, tmp_path: Path) -> None:
    settings.DATA_DIR = tmp_path / "a b%20c #d ;e 'f"
    settings.LOG_DIR, settings.TEMP_DIR = settings.DATA_DIR / "logs", settings.DATA_DIR / "tmp"
    settings.EMBEDDED_REDIS, settings.EMBEDDED_POSTGRES = True, False
    settings.DATA_DIR.mkdir(mode=0o700)
    settings.DEVICE, settings.TENSOR_PARALLEL = "cpu", 2
    file = Path(programs.supervisord()[-1])
    assert file.stat().st_mode & 0o777 == 0o600
    options = ServerOptions()
    options.realize(["--configuration", str(file)])
    read = {
        process.name: process for group in options.process_group_configs for process in group.process_configs
    }
    for program in [*programs.databases(), *programs.services()]:
        assert tuple(shlex.split(read[program.name].command)) == program.command
        assert read[program.name].environment == program.env
        assert Path(read[program.name].stdout_logfile).resolve() == settings.LOG_DIR / f"{program.name}.log"
    assert read["redis"].autostart
    assert not read["web"].autostart
    (server,) = options.server_configs
    assert Path(server["file"]) == programs.control_socket()
    assert server["chmod"] == 0o700
