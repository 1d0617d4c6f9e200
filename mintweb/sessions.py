"""Django's sessions in the database, for which no cookie is a mistake of the server's."""

from __future__ import annotations

from typing import Any

from django.contrib.sessions.backends import db


class SessionStore(db.SessionStore):
    """A browser's session; a key with NUL, which no text of PostgreSQL's holds, is nobody's."""

    def _validate_session_key(self, key: Any) -> bool:
        is_key: bool = super()._validate_session_key(key)  # type: ignore[misc] # Django's types lack it
        return is_key and "\0" not in key
