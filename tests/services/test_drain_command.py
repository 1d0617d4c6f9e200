"""`manage.py drain_worker`, for who has a shell and no browser."""

from __future__ import annotations

from io import StringIO

import pytest
from django.core.management import CommandError, call_command

from runs.models import TrainingRun
from runs.services import workers
from tests.services.hand_worker import HandWorker


def told(*arguments: str) -> str:
    output = StringIO()
    call_command("drain_worker", *arguments, stdout=output)
    return output.getvalue()


def test_a_worker_is_listed_drained_and_resumed(run: TrainingRun, worker: HandWorker) -> None:
    worker.hold(run)
    number = str(worker.row.pk)
    line = f"{number}  {worker.row.host}, process {worker.row.pid}: "
    assert told() == line + "alive, 1 runs, 0 samples\n"
    assert told(number) == line + "draining, 1 runs, 0 samples\n"
    worker.release(run)
    assert told() == line + "drained, 0 runs, 0 samples\n"
    assert told(number, "--resume") == line + "alive, 0 runs, 0 samples\n"


def test_a_worker_that_is_none_or_has_ended_is_refused(worker: HandWorker) -> None:
    with pytest.raises(CommandError, match=f"there is no worker {worker.row.pk + 1}"):
        told(str(worker.row.pk + 1))
    workers.stop(worker.row)
    for more in ([], ["--resume"]):
        with pytest.raises(CommandError, match="has ended"):
            told(str(worker.row.pk), *more)
    assert told() == ""
