"""Guesses are counted for all processes together, exactly, and locks end."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from django.db.models.functions import Now

from runs.models import SignInTries
from runs.services import lockout
from runs.services.lockout import LOCK_S, MAX_TRIES, MAX_TRIES_OF_ADDRESS, Attempt
from tests.services.races import race

ALICE = Attempt(name="Alice", address="192.0.2.1")


def test_the_try_after_the_last_waits_and_moves_the_end_no_further(db: None) -> None:
    assert [ALICE.begin() for _ in range(MAX_TRIES)] == [0.0] * MAX_TRIES
    waits = [Attempt(name="aLICE", address=ALICE.address).begin() for _ in range(3)]
    assert all(LOCK_S - 5 < wait_s <= LOCK_S for wait_s in waits)
    assert waits == sorted(waits, reverse=True)
    assert Attempt(name="bob", address=ALICE.address).begin() == 0
    assert Attempt(name="alice", address="192.0.2.2").begin() == 0


def test_a_lock_ends_and_the_count_begins_anew(db: None) -> None:
    for _ in range(MAX_TRIES + 20):
        ALICE.begin()
    SignInTries.objects.update(until=Now())
    assert [bool(ALICE.begin()) for _ in range(MAX_TRIES + 1)] == [False] * MAX_TRIES + [True]


def test_an_address_that_tries_many_names_is_locked_for_all(db: None) -> None:
    tries = [Attempt(name=f"name {number}", address="192.0.2.9") for number in range(MAX_TRIES_OF_ADDRESS)]
    assert not any(attempt.begin() for attempt in tries)
    num_rows = SignInTries.objects.count()
    assert Attempt(name="one more", address="192.0.2.9").begin() > 0
    assert SignInTries.objects.count() == num_rows  # nor does it fill the table


def test_signing_in_forgets_the_name_and_does_not_count_against_the_address(db: None) -> None:
    for _ in range(2 * MAX_TRIES_OF_ADDRESS):
        assert ALICE.begin() == 0
        ALICE.succeed()
    assert [row.num_tries for row in SignInTries.objects.all()] == [0]


@pytest.mark.django_db(transaction=True)
def test_tries_at_the_same_moment_are_counted_one_by_one() -> None:
    SignInTries.objects.all().delete()
    waits = race([ALICE.begin] * 24)
    assert sum(wait_s == 0 for wait_s in waits) == MAX_TRIES


def test_old_counts_are_deleted_and_tell_nobodys_name(db: None) -> None:
    ALICE.begin()
    assert all(re.fullmatch("[0-9a-f]{64}", row.key) for row in SignInTries.objects.all())
    lockout.forget_old()
    assert SignInTries.objects.count() == 2
    SignInTries.objects.update(until=Now() - timedelta(seconds=LOCK_S + 1))
    lockout.forget_old()
    assert not SignInTries.objects.exists()
