"""`manage.py create_api_key`: a key for a user, shown once."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from mintweb import probes
from runs.models import User
from runs.services import accounts, keys


class Command(BaseCommand):
    """Create an API key."""

    help = "Create an API key for a user and print it in both spellings; it cannot be shown again."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Take the user and the key's name."""
        parser.add_argument("--user", default=accounts.ADMIN_NAME, help="whose key (default: %(default)s)")
        parser.add_argument("--name", default="command line", help="what the key is for")

    def handle(self, *args: Any, **options: Any) -> None:
        """Create and print the key."""
        try:
            probes.check_database()
        except probes.NotAnswering as error:
            self.stderr.write(f"mintweb: {error}.")
            sys.exit(2)
        user = find_user(options["user"])
        _, secret = keys.create_key(user, options["name"])
        for spelling in keys.spellings(secret).values():
            self.stdout.write(spelling)


def find_user(name: str) -> User:
    """Return the user of this name; the first user is made when missing."""
    if name == accounts.ADMIN_NAME:
        return accounts.ensure_admin()
    try:
        return User.objects.get(username=name)
    except User.DoesNotExist:
        raise CommandError(f"there is no user {name!r}.") from None
