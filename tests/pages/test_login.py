"""Signing in and out."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path
from urllib.parse import urlencode

import pytest
from django.test import Client
from pytest_django.fixtures import Settings

import mintweb.settings
from runs.models import LoginLink, User
from runs.services import accounts, lockout
from tests.pages.conftest import PASSWORD
from tests.up.instances import clean_environment

pytestmark = pytest.mark.django_db


def sign_in(client: Client, name: str, password: str, **extra: str) -> int:
    reply = client.post("/login/", {"username": name, "password": password, **extra})
    return reply.status_code


def test_a_page_asks_for_a_login_and_goes_on_to_it(client: Client, alice: User) -> None:
    reply = client.get("/checkpoints/")
    assert reply.status_code == 302
    assert reply["location"] == "/login/?next=/checkpoints/"
    reply = client.post("/login/", {"username": "alice", "password": PASSWORD, "next": "/checkpoints/"})
    assert reply["location"] == "/checkpoints/"
    assert client.get("/checkpoints/").status_code == 200


@pytest.mark.parametrize("target", ["https://evil.example/", "//evil.example/", "javascript:alert(1)"])
def test_it_never_goes_on_to_another_site(client: Client, alice: User, target: str) -> None:
    reply = client.post("/login/", {"username": "alice", "password": PASSWORD, "next": target})
    assert reply["location"] == "/runs/"


def test_a_wrong_password_and_an_unknown_name_look_the_same(client: Client, alice: User) -> None:
    wrong = client.post("/login/", {"username": "alice", "password": "no"})
    unknown = client.post("/login/", {"username": "nobody", "password": "no"})
    assert wrong.status_code == unknown.status_code == 403
    assert b"do not match" in wrong.content
    assert b"do not match" in unknown.content


def test_many_wrong_tries_lock_the_name_for_this_address_alone(
    client: Client, alice: User, bob: User
) -> None:
    for _ in range(lockout.MAX_TRIES):
        assert sign_in(client, "alice", "no") == 403
    assert sign_in(client, "alice", PASSWORD) == 429
    assert sign_in(client, "bob", PASSWORD) == 302
    elsewhere = Client(REMOTE_ADDR="192.0.2.7")
    assert sign_in(elsewhere, "alice", PASSWORD) == 302


def test_opening_a_login_link_does_not_spend_it(client: Client, alice: User) -> None:
    token = accounts.create_login_link(alice)
    for _ in range(3):
        assert client.get(f"/login/{token}/").status_code == 200
    assert LoginLink.objects.get().used_at is None
    reply = client.post(f"/login/{token}/")
    assert reply["location"] == "/runs/"
    assert client.get("/runs/").wsgi_request.user == alice


def test_a_login_link_works_once(client: Client, alice: User) -> None:
    token = accounts.create_login_link(alice)
    client.post(f"/login/{token}/")
    reply = Client().post(f"/login/{token}/")
    assert reply.status_code == 403
    assert b"used before" in reply.content


def test_behind_a_proxy_forms_work_at_the_public_address(
    alice: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    """The proxy says neither scheme nor client, as one on another machine that is not believed."""
    address = {"MINTWEB_DATA_DIR": str(tmp_path), "MINTWEB_PUBLIC_URL": "https://mint.example.org/"}
    monkeypatch.setattr(os, "environ", clean_environment(**address))
    values = runpy.run_path(mintweb.settings.__file__)
    for name in ("ALLOWED_HOSTS", "CSRF_TRUSTED_ORIGINS", "SESSION_COOKIE_SECURE"):
        setattr(settings, name, values[name])
    headers = {"host": "mint.example.org", "origin": "https://mint.example.org"}
    browser = Client(enforce_csrf_checks=True, headers=headers)
    form = browser.get("/login/").content.decode()
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', form)
    assert token
    assert sign_in(browser, "alice", PASSWORD, csrfmiddlewaretoken=token[1]) == 302
    assert browser.cookies["mintweb_session"]["secure"]


def test_signing_in_changes_the_session_key(client: Client, alice: User) -> None:
    session = client.session
    session["before"] = True
    session.save()
    before = session.session_key
    sign_in(client, "alice", PASSWORD)
    assert client.session.session_key != before


@pytest.mark.parametrize(
    ("referer", "then"),
    [
        ("http://testserver/runs/?q=a", "/runs/?q=a"),
        ("https://evil.example/runs/", "/runs/"),
        ("", "/runs/"),
    ],
)
def test_a_form_that_is_sent_too_late_leads_back_to_its_page(
    client: Client, alice: User, referer: str, then: str
) -> None:
    reply = client.post("/runs/try", headers={"referer": referer} if referer else {})
    assert (reply.status_code, reply["location"]) == (302, f"/login/?{urlencode({'next': then}, safe='/')}")
    reply = client.post(reply["location"], {"username": "alice", "password": PASSWORD, "next": then})
    assert reply["location"] == then


def test_the_address_of_a_form_says_what_it_is(page: Client) -> None:
    reply = page.get("/runs/try")
    assert (reply.status_code, reply["allow"]) == (405, "POST")
    assert "only takes what a form sends" in reply.content.decode()


def test_signing_out_needs_a_post(page: Client) -> None:
    assert page.get("/logout/").status_code == 405
    assert page.get("/runs/").status_code == 200
    assert page.post("/logout/").status_code == 302
    assert page.get("/runs/").status_code == 302
