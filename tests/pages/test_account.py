"""Settings: keys and password; and the workers page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from django.test import Client

from runs.exceptions import NotAuthenticated
from runs.models import ApiKey, IdempotentReply, User
from runs.services import keys
from tests.pages import seed
from tests.pages.conftest import PASSWORD

pytestmark = pytest.mark.django_db


def test_a_new_key_is_shown_once_and_works(page: Client, alice: User) -> None:
    reply = page.post("/settings/keys/create", {"name": "laptop"})
    secret = reply.context["spellings"]["tinker"]
    text = reply.content.decode()
    assert f"TINKER_API_KEY={secret}" in text
    assert "MINT_API_KEY=sk-mint-" in text
    assert "MINT_BASE_URL=http://testserver" in text
    assert "no-store" in reply["cache-control"]
    assert keys.authenticate(secret) == alice
    assert secret not in page.get("/settings/").content.decode()


def test_a_form_that_comes_again_makes_no_second_key(page: Client, alice: User) -> None:
    form = {"name": "laptop", "csrfmiddlewaretoken": "a" * 64}
    secret = page.post("/settings/keys/create", form).context["spellings"]["tinker"]
    again = page.post("/settings/keys/create", form, follow=True)
    assert again.redirect_chain == [("/settings/", 302)]
    assert b"Key laptop was already created" in again.content
    assert secret.encode() not in again.content
    assert ApiKey.objects.count() == 1
    # The same page, gone back to, with another name; and another page with the same name.
    page.post("/settings/keys/create", {**form, "name": "server"})
    page.post("/settings/keys/create", {**form, "csrfmiddlewaretoken": "b" * 64})
    assert sorted(ApiKey.objects.values_list("name", flat=True)) == ["laptop", "laptop", "server"]


def test_no_secret_is_kept_for_a_form_that_may_come_again(page: Client, alice: User) -> None:
    form = {"name": "laptop", "csrfmiddlewaretoken": "a" * 64}
    secret = page.post("/settings/keys/create", form).context["spellings"]["tinker"]
    kept = IdempotentReply.objects.get()
    assert bytes(kept.body or b"") == b""
    assert secret not in str(vars(kept))


def test_each_page_has_a_form_of_its_own(page: Client, alice: User) -> None:
    texts = [page.get(address).content.decode() for address in ("/runs/", "/settings/", "/settings/")]
    tokens = [re.findall(r'name="csrfmiddlewaretoken" value="(\w{64})"', text) for text in texts]
    assert len({one for found in tokens for one in set(found)}) == 3
    for text in texts:
        assert re.search(r'action="/settings/keys/create"[^>]* data-once>', text)


def test_a_revoked_key_is_refused(page: Client, alice: User) -> None:
    key, secret = keys.create_key(alice, "old")
    page.post(f"/settings/keys/{key.pk}/revoke")
    with pytest.raises(NotAuthenticated):
        keys.authenticate(secret)
    assert "revoked" in page.get("/settings/").content.decode()
    assert ApiKey.objects.get().revoked_at is not None


def test_a_password_is_changed_and_this_browser_stays_signed_in(page: Client, alice: User) -> None:
    other = Client()
    other.force_login(alice)
    form = {"old_password": PASSWORD, "new_password": "a much better one", "repeated": "a much better one"}
    assert page.post("/settings/password", form).status_code == 302
    assert page.get("/runs/").status_code == 200
    assert other.get("/runs/").status_code == 302
    alice.refresh_from_db()
    assert alice.check_password("a much better one")


@pytest.mark.parametrize(
    ("old", "new", "repeated", "problem"),
    [
        ("wrong", "a much better one", "a much better one", "current password is not right"),
        (PASSWORD, "a much better one", "another", "differ"),
        (PASSWORD, "short", "short", "at least 10"),
        (PASSWORD, "1234567890", "1234567890", "too common"),
    ],
)
def test_a_bad_password_is_refused_with_its_reason(
    page: Client, alice: User, old: str, new: str, repeated: str, problem: str
) -> None:
    reply = page.post("/settings/password", {"old_password": old, "new_password": new, "repeated": repeated})
    assert reply.status_code == 422
    assert problem in reply.content.decode()
    alice.refresh_from_db()
    assert alice.check_password(PASSWORD)


def test_who_came_by_a_link_sets_a_first_password(client: Client) -> None:
    user = seed.make_user("carol")
    client.force_login(user)
    assert "Set a password" in client.get("/settings/").content.decode()
    client.post("/settings/password", {"new_password": "a much better one", "repeated": "a much better one"})
    user.refresh_from_db()
    assert user.check_password("a much better one")


def test_workers_are_shown_alive_and_ended(page: Client, alice: User, tmp_path: Path) -> None:
    worker = seed.make_worker()
    seed.make_worker(is_alive=False)
    seed.make_run(alice, worker=worker)
    seed.make_base_model(tmp_path, error="no such folder", worker=worker)
    text = page.get("/workers/").content.decode()
    for expected in ("alive", "ended", "83 %", "bfloat16", "no such folder"):
        assert expected in text
    assert page.get("/workers/?part").content.decode().lstrip().startswith("<div data-part")
