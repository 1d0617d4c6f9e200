"""Keys: only hashes are stored, both spellings work, a revoked key is dead everywhere."""

from __future__ import annotations

import re
import time
from typing import Any

import jwt
import pytest
from django.db import connection
from django.db.models.functions import Now
from pytest_django.fixtures import Settings

from runs.exceptions import NotAuthenticated, NotFound
from runs.models import ApiKey, LoginLink, User
from runs.services import accounts, keys

REVOKED_WITHIN_S = 5


def dump(table: str) -> str:
    """Return every column of every row as text."""
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT row_to_json(t)::text FROM {table} t")
        return "\n".join(row[0] for row in cursor.fetchall())


def test_the_table_holds_no_secret(alice: User) -> None:
    _, secret = keys.create_key(alice, "laptop")
    body = secret.removeprefix("tml-")
    stored = dump("runs_apikey")
    assert "laptop" in stored
    assert body[:6] in stored
    assert body[6:] not in stored
    assert body[-12:] not in stored


def test_a_key_is_long_random_and_recognisable(alice: User) -> None:
    _, first = keys.create_key(alice, "a")
    _, second = keys.create_key(alice, "b")
    assert re.fullmatch(r"tml-[A-Za-z0-9_-]{43}[0-9a-f]{6}", first)
    assert first != second


def test_both_spellings_are_the_same_key(alice: User) -> None:
    _, secret = keys.create_key(alice, "a")
    spellings = keys.spellings(secret)
    assert spellings == {"tinker": secret, "mint": "sk-mint-" + secret.removeprefix("tml-")}
    assert {keys.authenticate(spelling) for spelling in spellings.values()} == {alice}


@pytest.mark.parametrize(
    "credential",
    [
        "",
        "tml-",
        "sk-",
        "sk-mint-",
        "tml-" + "x" * 49,
        "nonsense",
        "eyJ",
        "eyJ.eyJ.x",
        "eyJ\xff\x00",
        "tml-\xff",
        "Tml-abc",
    ],
)
@pytest.mark.django_db
def test_what_is_no_key_is_refused(credential: str) -> None:
    with pytest.raises(NotAuthenticated):
        keys.authenticate(credential)
    with pytest.raises(NotAuthenticated):
        keys.issue_token(credential)


def test_use_is_noted(alice: User) -> None:
    key, secret = keys.create_key(alice, "a")
    assert key.last_used_at is None
    keys.authenticate(secret)
    key.refresh_from_db()
    assert key.last_used_at is not None


def test_a_token_names_its_owner_and_its_times(alice: User) -> None:
    _, secret = keys.create_key(alice, "a")
    token = keys.issue_token(secret)
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    assert {"sub", "org_id", "email", "iat", "exp"} <= set(claims)
    assert claims["exp"] - claims["iat"] >= 1800
    assert secret.removeprefix("tml-") not in str(claims)
    assert keys.authenticate(token) == alice
    assert keys.issue_token(token) == token


def test_a_token_with_another_signature_is_refused(alice: User) -> None:
    _, secret = keys.create_key(alice, "a")
    claims: dict[str, Any] = jwt.decode(keys.issue_token(secret), options={"verify_signature": False})
    forged = [
        jwt.encode(claims, "another secret of at least 32 bytes!", algorithm="HS256"),
        jwt.encode(claims, None, algorithm="none"),  # type: ignore[arg-type] # types ask for a key
    ]
    for token in forged:
        with pytest.raises(NotAuthenticated, match="not valid"):
            keys.authenticate(token)


def test_an_expired_token_is_refused(alice: User, settings: Settings) -> None:
    _, secret = keys.create_key(alice, "a")
    claims: dict[str, Any] = jwt.decode(keys.issue_token(secret), options={"verify_signature": False})
    token = jwt.encode(claims | {"exp": int(time.time()) - 1}, settings.SECRET_KEY, algorithm="HS256")
    with pytest.raises(NotAuthenticated, match="expired"):
        keys.authenticate(token)


def test_a_revoked_key_is_dead_at_once_in_this_process_with_its_token(alice: User) -> None:
    key, secret = keys.create_key(alice, "a")
    token = keys.issue_token(secret)
    keys.authenticate(secret)
    keys.revoke_key(alice, key.pk)
    for credential in (secret, "sk-mint-" + secret.removeprefix("tml-"), token):
        with pytest.raises(NotAuthenticated):
            keys.authenticate(credential)
    assert not keys.has_live_key(alice)


def test_a_key_revoked_by_another_process_is_dead_within_seconds(alice: User) -> None:
    key, secret = keys.create_key(alice, "a")
    token = keys.issue_token(secret)
    assert keys.authenticate(secret) == keys.authenticate(token) == alice
    ApiKey.objects.filter(pk=key.pk).update(revoked_at=Now())
    deadline = time.monotonic() + REVOKED_WITHIN_S
    for credential in (secret, token):
        while is_accepted(credential):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_accepted(credential: str) -> bool:
    try:
        keys.authenticate(credential)
    except NotAuthenticated:
        return False
    return True


def test_a_user_who_was_switched_off_has_no_key(alice: User) -> None:
    _, secret = keys.create_key(alice, "a")
    User.objects.filter(pk=alice.pk).update(is_active=False)
    with pytest.raises(NotAuthenticated):
        keys.authenticate(secret)


def test_only_the_owner_can_revoke_and_only_once(alice: User, bob: User) -> None:
    key, secret = keys.create_key(alice, "a")
    with pytest.raises(NotFound):
        keys.revoke_key(bob, key.pk)
    assert keys.authenticate(secret) == alice
    keys.revoke_key(alice, key.pk)
    with pytest.raises(NotFound):
        keys.revoke_key(alice, key.pk)


def test_the_key_of_the_settings_belongs_to_the_first_user(db: None, settings: Settings) -> None:
    settings.API_KEY = "sk-mint-of-the-settings"
    keys.ensure_key_from_settings()
    keys.ensure_key_from_settings()
    assert ApiKey.objects.count() == 1
    assert keys.authenticate("tml-of-the-settings") == accounts.ensure_admin()
    assert "of-the-settings" not in dump("runs_apikey")


def test_without_a_key_in_the_settings_none_is_made(db: None, settings: Settings) -> None:
    settings.API_KEY = ""
    keys.ensure_key_from_settings()
    assert not ApiKey.objects.exists()


def test_the_links_table_holds_no_token(alice: User) -> None:
    token = accounts.create_login_link(alice)
    assert LoginLink.objects.count() == 1
    assert token not in dump("runs_loginlink")
