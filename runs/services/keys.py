"""API keys and the short-lived tokens they are exchanged for.

A key is `tml-` or `sk-mint-` followed by 43 random characters and a 6-character checksum that lets
secret scanners recognise it; both spellings are the same key. Only HMAC-SHA-256 of the random part is stored.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
import zlib
from typing import Any, Final

import jwt
from django.conf import settings
from django.db.models.functions import Now

from runs.exceptions import NotAuthenticated, NotFound
from runs.models import ApiKey, User
from runs.services import accounts

PREFIXES: Final = ("tml-", "sk-mint-")
_TOKEN_LIFETIME_S: Final = 3600
_CACHE_S: Final = 3.0
_USED_INTERVAL_S: Final = 60


def create_key(user: User, name: str) -> tuple[ApiKey, str]:
    """Create a key; the returned secret cannot be shown again."""
    body = secrets.token_urlsafe(32)
    secret = f"tml-{body}{_checksum(body)}"
    return _store(user, name, secret), secret


def revoke_key(user: User, key_pk: int) -> None:
    """Make a key worthless everywhere within seconds.

    Raises:
        NotFound: there is no such live key of this user.
    """
    rows = ApiKey.objects.filter(pk=key_pk, owner=user, revoked_at=None).update(revoked_at=Now())
    if rows == 0:
        raise NotFound(f"there is no live key {key_pk}")
    _cache.clear()


def has_live_key(user: User) -> bool:
    """Say whether the user has a key that works."""
    return ApiKey.objects.filter(owner=user, revoked_at=None).exists()


def spellings(secret: str) -> dict[str, str]:
    """Return the key as each SDK wants it: `tinker` starts with tml-, `mint` with sk-mint-."""
    body = _body(secret)
    return {"tinker": f"tml-{body}", "mint": f"sk-mint-{body}"}


def ensure_key_from_settings() -> None:
    """Make the key of MINTWEB_API_KEY exist for the first user."""
    secret = settings.API_KEY
    if secret and not ApiKey.objects.filter(secret_hash=_hash(_body(secret))).exists():
        _store(accounts.ensure_admin(), "MINTWEB_API_KEY", secret)


def sent_in(api_key: str, authorization: str) -> str:
    """Return the key or token that a request's two headers hold, or an empty text."""
    scheme, _, token = authorization.partition(" ")
    return api_key or (token.strip() if scheme.lower() == "bearer" else "")


def authenticate(credential: str) -> User:
    """Return the user of a key or of a token made from one.

    Raises:
        NotAuthenticated: neither, or the key was revoked or the token has expired.
    """
    if credential.startswith("eyJ"):
        return _user_of_hash(_hash_in(credential))
    return _user_of_hash(_hash(_body(credential)))


def cached_user(credential: str) -> User | None:
    """Return the user if the credential was checked a moment ago; asks no database."""
    try:
        is_token = credential.startswith("eyJ")
        return _cache.get(_hash_in(credential) if is_token else _hash(_body(credential)))
    except NotAuthenticated:
        return None


def issue_token(credential: str) -> str:
    """Return a signed token for an hour, bound to the key it was made from."""
    if credential.startswith("eyJ"):
        authenticate(credential)
        return credential
    secret_hash = _hash(_body(credential))
    user = _user_of_hash(secret_hash)
    now = int(time.time())
    claims = {
        "sub": str(user.pk),
        "org_id": "mintweb",
        "email": user.email or f"{user.username}@localhost",
        "iat": now,
        "exp": now + _TOKEN_LIFETIME_S,
        "key": secret_hash,
    }
    return jwt.encode(claims, settings.SECRET_KEY, algorithm="HS256")


def _store(user: User, name: str, secret: str) -> ApiKey:
    body = _body(secret)
    return ApiKey.objects.create(owner=user, name=name[:100], prefix=body[:6], secret_hash=_hash(body))


def _body(secret: str) -> str:
    for prefix in PREFIXES:
        if secret.startswith(prefix):
            return secret[len(prefix) :]
    raise NotAuthenticated("an API key starts with tml- or sk-mint-")


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()) & 0xFFFFFF:06x}"


def _hash(body: str) -> str:
    return hmac.new(settings.SECRET_KEY.encode(), body.encode(), hashlib.sha256).hexdigest()


def _hash_in(token: str) -> str:
    """Return the hash of the key that a valid token was made from."""
    try:
        claims: dict[str, Any] = jwt.decode(token, settings.SECRET_KEY, algorithms=["HS256"])
    except jwt.PyJWTError as error:
        raise NotAuthenticated(f"this token is not valid: {error}") from error
    return str(claims["key"])


def _user_of_hash(secret_hash: str) -> User:
    user = _cache.get(secret_hash)
    if user is not None:
        return user
    key = ApiKey.objects.filter(secret_hash=secret_hash, revoked_at=None, owner__is_active=True)
    found = key.select_related("owner").first()
    if found is None:
        raise NotAuthenticated("this API key is unknown or was revoked")
    _note_use(found)
    _cache.put(secret_hash, found.owner)
    return found.owner


def _note_use(key: ApiKey) -> None:
    if key.last_used_at is None or time.time() - key.last_used_at.timestamp() > _USED_INTERVAL_S:
        ApiKey.objects.filter(pk=key.pk).update(last_used_at=Now())


class _Cache:
    """Users by key hash for a few seconds: the hot endpoints would otherwise ask on every request."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, User]] = {}
        self._lock = threading.Lock()

    def get(self, secret_hash: str) -> User | None:
        entry = self._entries.get(secret_hash)
        return entry[1] if entry is not None and entry[0] > time.monotonic() else None

    def put(self, secret_hash: str, user: User) -> None:
        with self._lock:
            if len(self._entries) > 10_000:
                self._entries.clear()
            self._entries[secret_hash] = (time.monotonic() + _CACHE_S, user)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


_cache = _Cache()
