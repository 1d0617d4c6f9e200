"""`manage.py create_user`: an account for one more person, and the link by which they come in."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from mintweb import probes
from runs.management.database_command import DatabaseCommand
from runs.models import User
from runs.services import accounts


class Command(DatabaseCommand):
    """Create an account."""

    help = "Create an account and print a link that signs its person in once within a day."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Take the name and the rights."""
        parser.add_argument("name", help="letters, digits and @ . + - _")
        parser.add_argument("--admin", action="store_true", help="with staff rights: may drain workers")

    def handle(self, *args: Any, **options: Any) -> None:
        """Create the account and print the link."""
        user = accounts.create_user(options["name"], is_staff=options["admin"])
        self.stdout.write(login_address(user))


def login_address(user: User) -> str:
    """Return an address that signs the user in once within a day."""
    return f"{probes.public_address()}/login/{accounts.create_login_link(user)}/"
