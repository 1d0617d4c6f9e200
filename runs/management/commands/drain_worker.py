"""`manage.py drain_worker`: empty a GPU worker before its machine is taken down, or have it take runs again."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from runs.exceptions import NotFound
from runs.management.database_command import DatabaseCommand
from runs.services import workers


class Command(DatabaseCommand):
    """Drain or resume a worker."""

    help = "Have a GPU worker finish what it computes, let its runs go and take nothing new; without a number, list them."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Take the worker and what to do."""
        parser.add_argument("worker", nargs="?", type=int, help="its number in the list")
        parser.add_argument("--resume", action="store_true", help="let it take runs again")

    def handle(self, *args: Any, **options: Any) -> None:
        """Ask the worker, and print what the live ones do."""
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
        raise NotFound(f"there is no worker {pk}")
    (workers.resume if resume else workers.drain)(worker)
