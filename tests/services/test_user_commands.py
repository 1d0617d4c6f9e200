"""`manage.py create_user` and `manage.py users`, for who runs mintweb for several people."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from runs.exceptions import NotAuthenticated, NotFound
from runs.models import User
from runs.services import access, accounts, keys
from tests.up.instances import ROOT, clean_environment


@pytest.fixture
def alice(db: None) -> User:
    """Return a user."""
    return accounts.create_user("alice")


def told(*arguments: str) -> str:
    output = StringIO()
    call_command(*arguments, stdout=output)
    return output.getvalue()


def path_of(link: str) -> str:
    """Return the path of a printed login link."""
    address, slash, path = link.strip().partition("/login/")
    assert address.startswith("http")
    return slash + path


def is_signed_in(client: Client) -> bool:
    return client.get("/runs/").status_code == 200


def test_the_printed_link_signs_the_new_person_in(db: None, client: Client) -> None:
    client.post(path_of(told("create_user", "carol")))
    assert is_signed_in(client)
    carol = User.objects.get(username="carol")
    assert not carol.has_usable_password()
    assert not carol.is_staff


def test_an_admin_is_an_operator(db: None) -> None:
    told("create_user", "carol", "--admin")
    access.check_operator(User.objects.get(username="carol"))


@pytest.mark.parametrize("name", ["", "two words", "a/b", "x" * 151, "line\n"])
def test_what_is_no_name_is_refused(db: None, name: str) -> None:
    with pytest.raises(CommandError, match="is no name: use 1 to 150 letters"):
        told("create_user", name)
    assert not User.objects.filter(username=name).exists()


def test_a_taken_name_is_refused_and_its_rights_stay(alice: User) -> None:
    with pytest.raises(CommandError, match=r"there is already a user 'alice'\."):
        told("create_user", "alice", "--admin")
    alice.refresh_from_db()
    assert not alice.is_staff


def test_accounts_are_listed_and_get_new_links(alice: User, client: Client) -> None:
    accounts.create_user("carol", is_staff=True)
    lines = told("users").splitlines()
    assert {"alice  user, never logged in", "carol  admin, never logged in"} <= set(lines)
    client.post(path_of(told("users", "alice")))
    assert is_signed_in(client)
    assert "alice  user, last login 20" in told("users")


def test_a_disabled_account_is_shut_out_until_it_is_enabled(alice: User, client: Client) -> None:
    client.force_login(alice)
    _, secret = keys.create_key(alice, "laptop")
    token = accounts.create_login_link(alice)
    assert "alice  user, last login" in told("users", "alice", "--disable").partition(", disabled\n")[0]
    assert not is_signed_in(client)
    with pytest.raises(NotAuthenticated):
        keys.authenticate(secret)
    with pytest.raises(NotFound):
        accounts.use_login_link(token)
    with pytest.raises(CommandError, match="'alice' is disabled: enable the account first"):
        told("users", "alice")
    assert "disabled" not in told("users", "alice", "--enable")
    assert is_signed_in(client)
    assert keys.authenticate(secret) == accounts.use_login_link(token) == alice


def test_without_a_database_they_say_how_to_get_one(tmp_path: Path) -> None:
    command = [sys.executable, "manage.py", "users"]
    env = clean_environment(MINTWEB_DATA_DIR=str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "mintweb: the embedded PostgreSQL is not running; start it with make up.\n"


def test_who_cannot_be_switched_is_named(db: None) -> None:
    with pytest.raises(CommandError, match="there is no user 'nobody'"):
        told("users", "nobody", "--disable")
    with pytest.raises(CommandError, match="'admin' cannot be disabled"):
        told("users", "admin", "--disable")
    with pytest.raises(CommandError, match="name the account to switch"):
        told("users", "--disable")
