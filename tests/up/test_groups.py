"""`manage.py up` with a worker over two devices: which processes there are, and what becomes of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import torch

from .instances import ROOT, Instance, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        torch.accelerator.current_accelerator() is not None, reason="this torch splits over its GPUs only"
    ),
]

FOLLOWER, WORKER = "gpuworker.follower", "--queues=gpu"


def test_each_part_of_a_group_is_replaced_with_the_others_and_none_outlives_it(
    make_instance: Callable[..., Instance],
) -> None:
    model = ROOT / "gpuworker" / "tiny" / "model"
    instance = make_instance(MINTWEB_TENSOR_PARALLEL="2", MINTWEB_BASE_MODELS=f"test/split={model}")
    instance.start()
    log = instance.data_dir / "logs" / "gpu.log"
    wait_for(lambda: "base model test/split is ready" in log.read_text(), 120, instance.describe)
    for killed in (FOLLOWER, WORKER):
        before = {part: instance.processes(part) for part in (FOLLOWER, WORKER)}
        assert [len(pids) for pids in before.values()] == [1, 1], instance.describe()
        num_ready = log.read_text().count("base model test/split is ready")
        os.kill(before[killed][0], signal.SIGKILL)
        wait_for(
            lambda: log.read_text().count("base model test/split is ready") > num_ready,  # noqa: B023 - called here
            180,
            instance.describe,
        )
        wait_for(
            lambda: not any(set(instance.processes(part)) & set(pids) for part, pids in before.items()),  # noqa: B023
            60,
            instance.describe,
        )
    assert instance.stop() == 0
    assert instance.processes() == []
