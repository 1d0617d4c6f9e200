"""`manage.py drain_worker`: empty a GPU worker before its machine is taken down, or have it take runs again."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from mintweb import probes
from runs.exceptions import RequestInvalid
from runs.services import workers


class Command(BaseCommand):
    """Drain or resume a worker."""

    help = "Have a GPU worker finish what it computes, let its runs go and take nothing new; without a number, list them."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Take the worker and what to do."""
        parser.add_argument("worker", nargs="?", type=int, help="its number in the list")
        parser.add_argument("--resume", action="store_true", help="let it take runs again")

    def handle(self, *args: Any, **options: Any) -> None:
        """Ask the worker, and print what the live ones do."""
        try:
            probes.check_database()
        except probes.NotAnswering as error:
            self.stderr.write(f"mintweb: {error}.")
            sys.exit(2)
        if options["worker"] is not None:
            steer(options["worker"], resume=options["resume"])
        for worker in workers.with_state().filter(workers.is_alive()).order_by("pk"):
            held = f"{worker.num_runs} runs, {worker.num_samples} samples"  # type: ignore[attr-defined]
            self.stdout.write(
                f"{worker.pk}  {worker.host}, process {worker.pid}: {workers.state_of(worker)}, {held}"
            )


def steer(pk: int, *, resume: bool) -> None:
    """Drain or resume the worker of this number."""
    worker = workers.with_state().filter(pk=pk).first()
    if worker is None:
        raise CommandError(f"there is no worker {pk}.")
    try:
        (workers.resume if resume else workers.drain)(worker)
    except RequestInvalid as error:
        raise CommandError(f"{error.message}.") from None
