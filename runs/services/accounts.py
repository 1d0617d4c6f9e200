"""People and how they sign in: the first user, one-time login links, passwords."""

from __future__ import annotations

import hashlib
import secrets
from datetime import timedelta

from django.db import connection
from django.db.models.functions import Now

from runs.exceptions import NotFound
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


def create_login_link(user: User) -> str:
    """Return a token for `/login/<token>/` that signs the user in once within a day."""
    token = secrets.token_urlsafe(32)
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        (now,) = cursor.fetchone()
    LoginLink.objects.create(user=user, token_hash=_hash(token), expires_at=now + _LINK_LIFETIME)
    return token


def use_login_link(token: str) -> User:
    """Return the link's user and spend the link.

    Raises:
        NotFound: the link is unknown, expired or was used before.
    """
    links = LoginLink.objects.filter(token_hash=_hash(token), used_at=None, expires_at__gt=Now())
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
