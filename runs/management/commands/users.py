"""`manage.py users`: who has an account; a new link for somebody, or an end of their access."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from runs.exceptions import RequestInvalid
from runs.management.commands.create_user import login_address
from runs.management.database_command import DatabaseCommand
from runs.models import User
from runs.services import accounts


class Command(DatabaseCommand):
    """List accounts, or change one."""

    help = "List the accounts; with a name, print a new login link for it, or switch it off or on."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Take the name and what to do."""
        parser.add_argument("name", nargs="?", help="an account in the list")
        switch = parser.add_mutually_exclusive_group()
        switch.add_argument("--disable", action="store_true", help="end sessions, keys and links at once")
        switch.add_argument("--enable", action="store_true", help="let them work again")

    def handle(self, *args: Any, **options: Any) -> None:
        """Print a link, change the account, or print them all."""
        if not options["name"] and (options["disable"] or options["enable"]):
            raise RequestInvalid("name the account to switch")
        if options["name"]:
            user = accounts.find_user(options["name"])
            if not (options["disable"] or options["enable"]):
                self.stdout.write(login_address(user))
                return
            accounts.set_active(user, is_active=options["enable"])
        for user in User.objects.order_by("username"):
            rights = "admin" if user.is_staff else "user"
            last = f"last login {user.last_login:%Y-%m-%d}" if user.last_login else "never logged in"
            self.stdout.write(f"{user.username}  {rights}, {last}{'' if user.is_active else ', disabled'}")
