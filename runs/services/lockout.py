"""Slows down guessing of passwords: after a number of tries a name is locked for its address, and an address for all names.

The counts are rows, so that all web processes share them and a restart forgets nothing. Whoever can sign in at all
reaches PostgreSQL, where the accounts are: there is no moment in which the counts are away and guesses are not, and
Redis has no part in it. A try is counted before the password is looked at, in one statement, so a hundred tries at the
same moment are no way round. Of a name and of an address only keyed digests are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from django.db import connection
from django.db.models import F
from django.db.models.functions import Greatest, Now
from django.utils.crypto import salted_hmac

from runs.models import SignInTries

MAX_TRIES: Final = 8
MAX_TRIES_OF_ADDRESS: Final = 60
LOCK_S: Final = 600

# A try that is one too many moves nothing but the count: a lock ends, however often somebody knocks.
_COUNT: Final = """
INSERT INTO runs_signintries AS kept (key, num_tries, until)
VALUES (%(key)s, 1, clock_timestamp() + make_interval(secs => %(lock_s)s))
ON CONFLICT (key) DO UPDATE SET
  num_tries = CASE WHEN kept.until <= clock_timestamp() THEN 1 ELSE LEAST(kept.num_tries, %(limit)s) + 1 END,
  until = CASE WHEN kept.until > clock_timestamp() AND kept.num_tries >= %(limit)s THEN kept.until
               ELSE clock_timestamp() + make_interval(secs => %(lock_s)s) END
RETURNING num_tries, EXTRACT(EPOCH FROM until - clock_timestamp())::float8
"""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try to sign in."""

    name: str
    address: str

    def begin(self) -> float:
        """Count the try; returns after how many seconds it may be made, 0 for now."""
        return _count(self._of_address, MAX_TRIES_OF_ADDRESS) or _count(self._of_name, MAX_TRIES)

    def succeed(self) -> None:
        """Forget the tries of this name from this address; those for other names stay the address's."""
        SignInTries.objects.filter(key=self._of_name).delete()
        SignInTries.objects.filter(key=self._of_address).update(num_tries=Greatest(F("num_tries") - 1, 0))

    @property
    def _of_name(self) -> str:
        return _digest(f"{self.address}\0{self.name.lower()}")

    @property
    def _of_address(self) -> str:
        return _digest(self.address)


def forget_old() -> None:
    """Delete the counts that lock nobody any more."""
    SignInTries.objects.filter(until__lt=Now() - timedelta(seconds=LOCK_S)).delete()


def _count(key: str, limit: int) -> float:
    with connection.cursor() as cursor:
        cursor.execute(_COUNT, {"key": key, "limit": limit, "lock_s": LOCK_S})
        num_tries, wait_s = cursor.fetchone()
    return max(wait_s, 1.0) if num_tries > limit else 0.0


def _digest(text: str) -> str:
    return salted_hmac("mintweb.sign-in", text, algorithm="sha256").hexdigest()
