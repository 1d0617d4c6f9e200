"""What holds for every address: a key, one form of errors, strict names, ETags, and nothing of anybody else's."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import OperationalError
from django.test import Client

from runs.models import DatasetVersion, Operation, Recipe, TrainingRun, WebhookDelivery
from runs.rest.api import schema
from runs.services import access, webhooks
from tests.pages import seed
from tests.rest.client import BASE, Rest, error_of

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, path and description of everything that the API offers."""
    for path, methods in schema()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path.removeprefix(BASE), operation


OPERATIONS = [(method, path) for method, path, _ in operations()]
# What a body must at least hold to get as far as the object that it is for.
BODIES: dict[str, object] = {
    "change_run": {"learning_rate": 1e-4},
    "rename_run": {"name": "x"},
    "extend_run": {"num_steps": 5},
    "choose_mapping": {"mapping": {"prompt": "a"}},
}


def test_there_is_a_documented_operation_for_each_thing() -> None:
    assert len(OPERATIONS) > 40
    assert {path.partition("/")[0] for _, path in OPERATIONS} >= {
        *("runs", "datasets", "checkpoints", "samples", "webhooks", "keys", "workers", "base-models", "me")
    }


@pytest.mark.django_db
def test_nothing_opens_without_a_key() -> None:
    stranger = Client(raise_request_exception=False)
    for method, path in OPERATIONS:
        address = BASE + re.sub(r"\{\w+\}", "1", path)
        reply: Any = stranger.generic(method, address)
        error = error_of(reply, 401)
        assert error["code"] == "not_authenticated", path
        assert "Bearer" in error["hint"]
        assert reply.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "credential", ["tml-unknown", "sk-mint-unknown", "something else", "eyJhbGciOi", "\x80"]
)
def test_no_wrong_key_opens_anything(alice: Rest, credential: str) -> None:
    assert alice.refused("GET", "runs", status=401, x_api_key=credential)["code"] == "not_authenticated"


def test_a_key_works_in_both_headers_and_both_spellings(alice: Rest) -> None:
    other = "sk-mint-" + alice.key.removeprefix("tml-")
    for headers in (
        {"x_api_key": alice.key},
        {"x_api_key": other},
        {"x_api_key": "", "authorization": f"Bearer {alice.key}"},
        {"x_api_key": "", "authorization": f"bearer  {other}"},
    ):
        assert alice.get("me", **headers) == {"username": "alice", "email": "alice@example.org"}


def test_a_session_cookie_opens_nothing(alice: Rest, client: Client) -> None:
    client.force_login(alice.user)
    assert client.get(f"{BASE}me").status_code == 401


def foreign_ids(alice: Rest, recipe: Recipe, version: DatasetVersion) -> dict[str, dict[str, str]]:
    """Make one of everything for alice; return the ids by the first word of the address."""
    run = recipe.run
    seed.add_checkpoint(run, "one")
    sample = seed.add_sample(run, [1, 2], [[3]])
    hook = webhooks.create(alice.user, url="https://example.org/hook", wanted=["run.failed"], threshold={})
    return {
        "runs": {"run_id": run.public_id, "kind": "weights", "name": "one"},
        "datasets": {"dataset_id": version.dataset.public_id, "number": "1"},
        "samples": {"sample_id": sample.request_id},
        "webhooks": {"webhook_id": hook.public_id},
        "keys": {"key_id": str(access.keys_of(alice.user).get().pk)},
    }


def test_what_is_somebody_elses_looks_as_if_it_did_not_exist(
    alice: Rest, bob: Rest, recipe: Recipe, version: DatasetVersion
) -> None:
    ids = foreign_ids(alice, recipe, version)
    before = content_of(recipe.run)
    num_tried = 0
    for method, path, operation in operations():
        # Workers are nobody's: test_account.py has who may drain them.
        if "{" not in path or path.startswith("workers/"):
            continue
        address = path.format(**ids[path.partition("/")[0]])
        takes_file = (
            "requestBody" in operation and "multipart/form-data" in operation["requestBody"]["content"]
        )
        body = b"{}" if takes_file else BODIES.get(operation["operationId"], {})
        headers = {"content_type": "application/octet-stream"} if takes_file else {}
        error = bob.refused(method, address, body, status=404, **headers)
        assert error["code"] == "not_found", path
        num_tried += 1
        nothing = re.sub(r"[0-9a-f]{8}-|(?<=ds-)|(?<=wh-)", "0", address)
        if method == "GET" and nothing != address:
            missing = bob.refused("GET", nothing, status=404)
            assert len(missing["message"]) == pytest.approx(len(error["message"]), abs=8), path
    assert num_tried > 30
    assert content_of(recipe.run) == before


def content_of(run: TrainingRun) -> list[object]:
    """Return what a stranger might have changed."""
    rows = [
        Recipe.objects.filter(run=run).values().get(),
        TrainingRun.objects.filter(pk=run.pk).values().get(),
        Operation.objects.count(),
        WebhookDelivery.objects.count(),
        run.checkpoints.count(),
        DatasetVersion.objects.values_list("pk", flat=True).count(),
    ]
    return list(rows)


def test_lists_hold_nothing_of_anybody_else(
    alice: Rest, bob: Rest, recipe: Recipe, version: DatasetVersion
) -> None:
    foreign_ids(alice, recipe, version)
    for path in ("runs", "datasets", "checkpoints", "webhooks"):
        assert alice.get(path)["items"]
        assert bob.get(path)["items"] == []
    assert bob.get("me/usage")["num_runs"] == 0


@pytest.mark.parametrize("path", ["nothing", "", "runs/", "runs/a/b/c/d/e", "Runs", "runs/%00/events"])
def test_an_address_that_is_none_is_told_in_json(alice: Rest, path: str) -> None:
    assert alice.refused("GET", path, status=404)["code"] == "not_found"


@pytest.mark.parametrize("path", ["runs", "datasets", "me", "workers", "runs/x/pause"])
def test_a_wrong_method_is_told_with_the_right_ones(alice: Rest, path: str) -> None:
    for method in (*METHODS, "OPTIONS", "TRACE"):
        if (method, path) not in OPERATIONS and (method, path.replace("/x/", "/{run_id}/")) not in OPERATIONS:
            reply = alice.send(method, path)
            assert error_of(reply, 405)["code"] == "method_not_allowed"
            assert reply.headers["allow"]


@pytest.mark.parametrize(
    ("query", "place", "message"),
    [
        ("?states=running", "states", "unknown query parameter 'states'; allowed: "),
        ("?limit=0", "limit", "greater than or equal to 1"),
        ("?limit=201", "limit", "less than or equal to 200"),
        ("?limit=5&limit=6", "limit", "given 2 times"),
        ("?limit=five", "limit", "valid integer"),
        ("?state=broken", "state", "must be 'preparing', 'queued'"),
        ("?sort=size", "sort", "'created_at'"),
        ("?cursor=nonsense", "cursor", "no cursor of this server"),
        ("?name=a%00b", "name", "NUL"),
    ],
)
def test_a_wrong_parameter_is_named(alice: Rest, query: str, place: str, message: str) -> None:
    error = alice.refused("GET", f"runs{query}")
    assert (error["code"], error["place"]) == ("invalid_request", place)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "JSON"),
        (b"{", 422, "JSON"),
        (b'{"url": "a", "url": "b"}', 422, "url"),
        (b"[]", 422, "object"),
        (b'{"x": NaN}', 422, "NaN"),
        (b"\xff\xfe", 422, ""),
        (b"[" * 100_000, 422, ""),
    ],
)
def test_a_body_that_is_no_object_is_refused(alice: Rest, body: bytes, status: int, message: str) -> None:
    error = alice.refused("POST", "webhooks", body, status=status)
    assert message in f"{error['place']} {error['message']}"


def test_a_body_of_another_type_is_refused(alice: Rest) -> None:
    error = alice.refused(
        "POST", "webhooks", b"a=1", status=415, content_type="application/x-www-form-urlencoded"
    )
    assert "application/json" in error["message"]


def test_a_body_that_is_too_large_is_refused(alice: Rest) -> None:
    error = alice.refused("POST", "webhooks", b" " * (django_settings.MAX_BODY_BYTES + 1), status=413)
    assert error["code"] == "payload_too_large"


def test_every_problem_of_a_body_is_told(alice: Rest) -> None:
    body = {"base_model": 7, "lora": {"rank": "16", "alpha": 3}, "num_steps": True, "dataset": "rows.jsonl"}
    error = alice.refused("POST", "runs", body)
    places = [problem["place"] for problem in error["problems"]]
    assert {"base_model", "lora.rank", "lora.alpha", "num_steps", "dataset"} == set(places)
    assert error["place"] == places[0]


def test_an_unchanged_answer_is_not_sent_again(alice: Rest, run: TrainingRun) -> None:
    path = f"runs/{run.public_id}/events"
    first = alice.send("GET", path)
    tag = first.headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', tag)
    for asked in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = alice.send("GET", path, if_none_match=asked)
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert alice.send("GET", path, if_none_match='"other"').status_code == 200


def test_an_etag_changes_with_the_object(alice: Rest, run: TrainingRun) -> None:
    path = f"runs/{run.public_id}"
    old = alice.send("GET", path).headers["etag"]
    assert alice.send("GET", path).headers["etag"] == old
    alice.done("PATCH", path, {"name": "new"}, if_match=old)
    assert alice.send("GET", path, if_none_match=old).status_code == 200
    error = alice.refused("PATCH", path, {"name": "newer"}, status=412, if_match=old)
    assert (error["code"], error["place"]) == ("precondition_failed", "If-Match")
    run.refresh_from_db()
    assert run.name == "new"
    alice.done("PATCH", path, {"name": "newest"}, if_match="*")


def test_a_requests_id_comes_back(alice: Rest) -> None:
    assert alice.send("GET", "me", x_request_id="nightly-7").headers["x-request-id"] == "nightly-7"
    made = alice.send("GET", "me", x_request_id="a b\tc" * 50).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{16}", made)


def test_no_cache_keeps_an_answer_for_somebody_else(alice: Rest) -> None:
    headers = alice.send("GET", "me").headers
    assert headers["cache-control"] == "private, no-cache"
    assert {"Authorization", "X-API-Key"} <= set(headers["vary"].split(", "))


def test_a_database_that_is_away_is_told_as_such(alice: Rest, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_away(user: object) -> None:
        raise OperationalError("the connection is closed")

    monkeypatch.setattr(access, "runs_of", is_away)
    reply = alice.send("GET", "runs")
    assert error_of(reply, 503)["code"] == "unavailable"
    assert reply.headers["retry-after"] == "1"


def test_a_surprise_is_logged_and_tells_nothing(
    alice: Rest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(user: object) -> None:
        raise ValueError("secret words")

    monkeypatch.setattr(access, "runs_of", breaks)
    with caplog.at_level(logging.ERROR):
        error = alice.refused("GET", "runs", status=500)
    assert error["code"] == "server_error"
    assert "secret words" not in str(error)
    assert error["request_id"] in caplog.text
    assert "secret words" in caplog.text
