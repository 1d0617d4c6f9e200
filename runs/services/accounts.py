"""People and how they sign in: the first user, one-time login links, passwords."""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import timedelta

from django.contrib.auth.hashers import make_password
from django.db import connection
from django.db.models.functions import Now

from runs.exceptions import NotFound, RequestInvalid
from runs.models import LoginLink, User

ADMIN_NAME = "admin"
_LINK_LIFETIME = timedelta(hours=24)


def ensure_admin() -> User:
    """Return the first user, made without a usable password when missing."""
    user, created = User.objects.get_or_create(
        username=ADMIN_NAME, defaults={"is_staff": True, "is_superuser": True}
    )
    if created:
        user.set_unusable_password()
        user.save(update_fields=["password"])
    return user


def create_user(name: str, *, is_staff: bool = False) -> User:
    """Return a new user without a usable password: a login link lets its person in.

    Raises:
        RequestInvalid: the name is taken or no name.
    """
    if not re.fullmatch(r"[\w@.+-]{1,150}", name):
        raise RequestInvalid(f"{name[:150]!r} is no name: use 1 to 150 letters, digits and @ . + - _")
    unusable = make_password(None)
    user, created = User.objects.get_or_create(
        username=name, defaults={"is_staff": is_staff, "password": unusable}
    )
    if not created:
        raise RequestInvalid(f"there is already a user {name!r}")
    return user


def find_user(name: str) -> User:
    """Return the user of this name; the first user is made when missing.

    Raises:
        NotFound: there is none.
    """
    if name == ADMIN_NAME:
        return ensure_admin()
    user = User.objects.filter(username=name).first()
    if user is None:
        raise NotFound(f"there is no user {name!r}")
    return user


def set_active(user: User, *, is_active: bool) -> None:
    """Let a user's sessions, keys and login links work or not; what the user owns stays, and runs go on.

    Raises:
        RequestInvalid: it is the first user, as which `make up` lets its operator in.
    """
    if user.username == ADMIN_NAME:
        raise RequestInvalid(f"{ADMIN_NAME!r} cannot be disabled: make up signs its operator in by that name")
    user.is_active = is_active
    user.save(update_fields=["is_active"])


def create_login_link(user: User) -> str:
    """Return a token for `/login/<token>/` that signs the user in once within a day.

    Raises:
        RequestInvalid: the user is disabled.
    """
    if not user.is_active:
        raise RequestInvalid(f"{user.username!r} is disabled: enable the account first")
    token = secrets.token_urlsafe(32)
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        (now,) = cursor.fetchone()
    LoginLink.objects.create(user=user, token_hash=_hash(token), expires_at=now + _LINK_LIFETIME)
    return token


def use_login_link(token: str) -> User:
    """Return the link's user and spend the link.

    Raises:
        NotFound: the link is unknown, expired or was used before, or its user is disabled.
    """
    live = LoginLink.objects.filter(used_at=None, expires_at__gt=Now(), user__is_active=True)
    links = live.filter(token_hash=_hash(token))
    link = links.select_related("user").first()
    if link is None or links.update(used_at=Now()) == 0:
        raise NotFound("this login link is unknown, has expired or was used before")
    return link.user


def set_password(user: User, password: str) -> None:
    """Let the user sign in with this password from now on; other browsers are signed out."""
    user.set_password(password)
    user.save(update_fields=["password"])


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
