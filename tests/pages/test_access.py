"""What every page promises: a login, the owner alone, a token on every change, the security headers."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.urls import URLPattern, reverse
from django.urls.converters import StringConverter

from runs import urls
from runs.models import Checkpoint, TrainingRun, User
from runs.services import keys
from tests.pages import seed
from tests.pages.conftest import PASSWORD

pytestmark = pytest.mark.django_db
POST_ONLY = {
    "logout",
    "run-rename",
    "run-pause",
    "run-resume",
    "run-stop",
    "run-save",
    "run-change",
    "run-extend",
    "run-retry",
    "run-new-preview",
    "run-new-import",
    "run-new-export",
    "run-try",
    "checkpoint-delete",
    "checkpoint-delete-many",
    "checkpoint-keep",
    "dataset-check",
    "dataset-columns",
    "dataset-delete",
    "dataset-edit",
    "dataset-encoding",
    "dataset-example",
    "dataset-skip",
    "key-create",
    "key-revoke",
    "password-change",
    "worker-drain",
    "worker-resume",
}
POSTS_TOO = {"login", "login-link", "run-new"}
FIELDS = (
    *(
        "username",
        "next",
        "run",
        "runs",
        "q",
        "sort",
        "state",
        "checkpoint",
        "path",
        "paths",
        "dataset",
        "fork",
    ),
    *(
        "name",
        "ids",
        "after",
        "before",
        "cursor",
        "page",
        "from",
        "base_model",
        "kind",
        "token",
        "old",
        "new",
    ),
)
OF_A_RUN = {
    "run-detail",
    "run-panels",
    "run-rename",
    "run-metrics",
    "run-metrics-csv",
    "run-series",
    "run-ancestry",
    "run-film-strip",
    "run-settings-yaml",
    "run-pause",
    "run-resume",
    "run-stop",
    "run-save",
    "run-change",
    "run-extend",
    "run-retry",
    "checkpoint-download",
    "checkpoint-delete",
    "checkpoint-keep",
}


@pytest.fixture
def theirs(bob: User) -> Checkpoint:
    run = seed.make_run(bob, name="bob's secret")
    seed.add_values(run, seed.curve(3))
    return seed.add_checkpoint(run, "first")


def address(pattern: URLPattern, checkpoint: Checkpoint, key_pk: int) -> str:
    values: dict[str, Any] = {
        "run_id": checkpoint.run.public_id,
        "kind": checkpoint.kind,
        "name": checkpoint.name,
        "pk": key_pk,
        "dataset_id": "ds-000000000000",
        "number": 1,
        "token": "x",
    }
    assert pattern.name
    return reverse(pattern.name, kwargs={name: values[name] for name in pattern.pattern.converters})


def policy_of(pattern: URLPattern) -> str:
    callback: Any = pattern.callback
    policy: str = getattr(callback, "consumer_class", callback).policy
    return policy


def test_every_route_declares_a_policy() -> None:
    assert {policy_of(pattern) for pattern in urls.page_urls} == {"public", "owner", "operator"}
    assert {policy_of(pattern) for pattern in urls.socket_routes} == {"owner"}


@pytest.mark.parametrize("pattern", urls.page_urls, ids=lambda pattern: pattern.name)
def test_a_stranger_is_sent_to_the_login(client: Client, theirs: Checkpoint, pattern: URLPattern) -> None:
    reply = client.generic("POST" if pattern.name in POST_ONLY else "GET", address(pattern, theirs, 1))
    if policy_of(pattern) == "public":
        assert reply.status_code in (200, 302)
    else:
        assert reply.status_code == 302
        assert reply["location"].startswith("/login/?next=")


@pytest.mark.parametrize("name", sorted(OF_A_RUN))
def test_what_is_not_yours_looks_as_if_it_were_missing(page: Client, theirs: Checkpoint, name: str) -> None:
    pattern = next(pattern for pattern in urls.page_urls if pattern.name == name)
    path = address(pattern, theirs, 1)
    method = "POST" if name in POST_ONLY else "GET"
    missing = path.replace(theirs.run.public_id, "00000000-0000-4000-8000-000000000000:train:0")
    reply, reply_missing = page.generic(method, path), page.generic(method, missing)
    assert reply.status_code == reply_missing.status_code == 404
    assert b"bob" not in reply.content
    assert Checkpoint.objects.filter(pk=theirs.pk).exists()
    assert TrainingRun.objects.get(pk=theirs.run.pk).name == "bob's secret"


def test_somebody_elses_key_cannot_be_revoked(page: Client, bob: User) -> None:
    key, _ = keys.create_key(bob, "bob's")
    assert page.post(f"/settings/keys/{key.pk}/revoke").status_code == 404
    key.refresh_from_db()
    assert key.revoked_at is None


@pytest.mark.parametrize(
    "pattern",
    [p for p in urls.page_urls if p.name in POST_ONLY | POSTS_TOO],
    ids=lambda pattern: pattern.name,
)
def test_a_change_without_a_token_is_refused(alice: User, pattern: URLPattern) -> None:
    run = seed.make_run(alice, name="kept")
    checkpoint = seed.add_checkpoint(run, "first")
    key, _ = keys.create_key(alice, "key")
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(alice)
    reply = strict.post(address(pattern, checkpoint, key.pk), {"name": "changed", "path": "x"})
    assert reply.status_code == 403
    assert b"out of date" in reply.content
    assert Checkpoint.objects.filter(pk=checkpoint.pk).exists()


@pytest.mark.parametrize("pattern", [p for p in urls.page_urls if p.name in POST_ONLY], ids=lambda p: p.name)
def test_a_change_needs_a_post(page: Client, alice: User, pattern: URLPattern) -> None:
    User.objects.filter(pk=alice.pk).update(is_staff=True)
    checkpoint = seed.add_checkpoint(seed.make_run(alice), "first")
    assert page.get(address(pattern, checkpoint, 1)).status_code == 405


@pytest.mark.parametrize(
    "path", ["/runs/", "/datasets/", "/checkpoints/", "/workers/", "/settings/", "/login/x/", "/nothing/"]
)
def test_every_page_forbids_foreign_and_inline_code(page: Client, path: str) -> None:
    reply = page.get(path)
    policy = reply["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert reply["x-content-type-options"] == "nosniff"
    text = reply.content.decode()
    assert " style=" not in text
    assert " on" + "click=" not in text
    assert "<script>" not in text


def test_a_missing_page_says_so(page: Client) -> None:
    reply = page.get("/nothing/")
    assert reply.status_code == 404
    assert b"There is nothing here" in reply.content


@pytest.mark.parametrize("route", urls.page_urls, ids=lambda route: str(route.name))
def test_a_nul_anywhere_is_the_visitor_s_mistake(page: Client, run: TrainingRun, route: URLPattern) -> None:
    page.raise_request_exception = False
    converters = route.pattern.converters
    names = [name for name, converter in converters.items() if isinstance(converter, StringConverter)]
    numbers = {name: 1 for name in converters if name not in names}
    nuls = dict.fromkeys(FIELDS, "tinker://\0/weights/x")
    for args in [*({**dict.fromkeys(names, "x"), name: "\0"} for name in names), dict.fromkeys(names, "x")]:
        path = reverse(str(route.name), kwargs={**args, **numbers})
        for fields in (nuls, dict.fromkeys(FIELDS, "\0"), {}):
            for reply in (page.get(path, fields), page.post(path, fields)):
                assert reply.status_code < 500, (path, fields)


def test_a_nul_in_an_address_is_nothing_s_name(page: Client, tokenizer: object) -> None:
    assert page.get("/runs/%00/").status_code == page.get("/datasets/%00/").status_code == 404
    reply = page.post("/runs/delete", {"run": "a\0"})
    assert (reply.status_code, b"run: must not hold NUL" in reply.content) == (422, True)
    reply = page.get("/playground/?checkpoint=tinker://%00/weights/x")
    assert (reply.status_code, b"is no checkpoint path" in reply.content) == (422, True)


def test_a_nul_in_a_name_is_a_wrong_name(client: Client, alice: User) -> None:
    reply = client.post("/login/", {"username": "alice\0", "password": PASSWORD})
    assert (reply.status_code, b"do not match" in reply.content) == (403, True)


def test_a_nul_in_a_cookie_is_nobody_s_session(client: Client, db: None) -> None:
    reply = client.get("/runs/", headers={"cookie": 'mintweb_session="\\000aaaaaaaaaaaa"'})
    assert (reply.status_code, reply["location"]) == (302, "/login/?next=/runs/")
