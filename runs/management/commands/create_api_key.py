"""`manage.py create_api_key`: a key for a user, shown once."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from runs.management.database_command import DatabaseCommand
from runs.services import accounts, keys


class Command(DatabaseCommand):
    """Create an API key."""

    help = "Create an API key for a user and print it in both spellings; it cannot be shown again."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Take the user and the key's name."""
        parser.add_argument("--user", default=accounts.ADMIN_NAME, help="whose key (default: %(default)s)")
        parser.add_argument("--name", default="command line", help="what the key is for")

    def handle(self, *args: Any, **options: Any) -> None:
        """Create and print the key."""
        _, secret = keys.create_key(accounts.find_user(options["user"]), options["name"])
        for spelling in keys.spellings(secret).values():
            self.stdout.write(spelling)
