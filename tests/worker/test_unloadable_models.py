"""A base model that cannot be loaded, for whatever reason, is reported; the worker serves the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_django.fixtures import Settings

from gpuworker import boot
from runs.models import BaseModel, Operation, Worker
from runs.services import workers
from tests.worker.conftest import Client, Start, finished

LARGE = "test/large"


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
            "it does not fit into memory",
        ),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
    ids=["no memory", "anything"],
)
def test_the_others_are_served(
    failure: Exception,
    words: str,
    settings: Settings,
    base_model: str,
    model_directory: Path,
    new_client: Callable[..., Client],
    start_worker: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings.BASE_MODELS = {LARGE: str(model_directory), **settings.BASE_MODELS}
    move = torch.nn.Module.to
    failures = [failure]

    def move_or_fail(model: torch.nn.Module, *args: Any) -> torch.nn.Module:
        if failures:
            raise failures.pop()
        moved: torch.nn.Module = move(model, *args)
        return moved

    monkeypatch.setattr(torch.nn.Module, "to", move_or_fail)
    worker = start_worker()
    assert words in BaseModel.objects.get(name=LARGE).error
    assert Worker.objects.get(pk=worker.row.pk).fingerprint.keys() == {base_model}
    assert finished(new_client().forward_backward([3, 14, 15])).state == Operation.State.DONE


def test_a_device_that_is_lost_is_no_fault_of_the_model(
    base_model: str, transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.nn.Module, "to", lose)
    with pytest.raises(RuntimeError, match="CUDA error"):
        boot.load_engines(workers.register(device="cpu", dtype="float32"))
    assert not BaseModel.objects.filter(name=base_model).exists()
