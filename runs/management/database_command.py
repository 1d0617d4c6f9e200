"""A command on the rows: it needs the database, and says in one sentence what it refuses."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from mintweb import probes
from runs.exceptions import MintError


class DatabaseCommand(BaseCommand):
    """Runs once the database has answered; a service's refusal ends it like a wrong argument."""

    def execute(self, *args: Any, **options: Any) -> str | None:
        """Run the command."""
        try:
            probes.check_database()
        except probes.NotAnswering as error:
            self.stderr.write(f"mintweb: {error}.")
            sys.exit(2)
        try:
            return super().execute(*args, **options)
        except MintError as error:
            raise CommandError(f"{error.message}.") from None
