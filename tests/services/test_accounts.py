"""The first user, login links and passwords."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import pytest
from django.db.models import F
from django.db.models.functions import Now

from runs.exceptions import NotFound
from runs.models import LoginLink, User
from runs.services import accounts
from tests.services.races import race


def test_the_first_user_is_made_once_and_without_a_password(db: None) -> None:
    admin = accounts.ensure_admin()
    assert accounts.ensure_admin() == admin
    assert not admin.has_usable_password()
    assert admin.is_superuser


def test_a_link_signs_in_once(alice: User) -> None:
    token = accounts.create_login_link(alice)
    assert accounts.use_login_link(token) == alice
    with pytest.raises(NotFound):
        accounts.use_login_link(token)


def test_an_unknown_link_signs_nobody_in(alice: User) -> None:
    accounts.create_login_link(alice)
    for token in ("", "x", "\0"):
        with pytest.raises(NotFound):
            accounts.use_login_link(token)


def test_a_link_ends_after_a_day(alice: User) -> None:
    token = accounts.create_login_link(alice)
    assert LoginLink.objects.filter(expires_at__gt=Now() + timedelta(hours=23)).exists()
    LoginLink.objects.update(expires_at=F("expires_at") - timedelta(hours=24, seconds=1))
    with pytest.raises(NotFound):
        accounts.use_login_link(token)


@pytest.mark.django_db(transaction=True)
def test_a_link_opened_in_many_places_at_once_signs_in_once(alice: User) -> None:
    def use(token: str) -> bool:
        try:
            return accounts.use_login_link(token) == alice
        except NotFound:
            return False

    assert sum(race([partial(use, accounts.create_login_link(alice))] * 8)) == 1


def test_a_password_is_stored_hashed(alice: User) -> None:
    accounts.set_password(alice, "correct horse battery")
    alice.refresh_from_db()
    assert alice.check_password("correct horse battery")
    assert "horse" not in alice.password
