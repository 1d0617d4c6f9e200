"""The page for people and the document for programs: both whole, both open to everybody."""

from __future__ import annotations

import html
import json
import re
import time
from typing import Any

import jsonschema_rs
import pytest
from django.conf import settings
from django.test import Client

from runs.rest import docs, errors
from runs.rest.api import schema
from runs.services import webhook_sender
from tests.rest.test_boundary import OPERATIONS, operations


@pytest.fixture
def page(client: Client, db: None) -> str:
    """Return the page as a stranger sees it."""
    reply = client.get("/rest/v1/docs")
    assert reply.status_code == 200
    return reply.content.decode()


def test_the_document_is_served_to_everybody(client: Client, db: None) -> None:
    reply = client.get("/rest/v1/openapi.json")
    assert reply.json() == schema()
    tag = reply.headers["etag"]
    assert client.get("/rest/v1/openapi.json", headers={"if-none-match": tag}).status_code == 304
    assert client.post("/rest/v1/openapi.json").status_code == 405


def test_every_operation_is_on_the_page_with_a_link(page: str) -> None:
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(names)) == len(names)
    for name in names:
        assert page.count(f'id="{name}"') == 1
        assert f'href="#{name}"' in page
    assert page.count('class="card api-doc"') == len(OPERATIONS)


def test_the_page_runs_no_script_of_its_own(page: str) -> None:
    assert re.findall(r"<script(?![^>]* src=)", page) == []
    assert " style=" not in page
    assert "cdn" not in page


def test_marks_become_code_and_nothing_else_does() -> None:
    assert docs._marked("a `b` <i>") == "a <code>b</code> &lt;i&gt;"
    assert docs._marked("") == ""


def test_the_documented_check_knows_our_signatures() -> None:
    text = (settings.BASE_DIR / "docs" / "rest.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import hashlib.*?)```", text, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    now = int(time.time())
    header = webhook_sender.signature("whsec_1", b"{}", timestamp=now)
    assert names["is_ours"]("whsec_1", header, b"{}")
    assert not names["is_ours"]("whsec_2", header, b"{}")
    assert not names["is_ours"]("whsec_1", header, b"{ }")
    old = webhook_sender.signature("whsec_1", b"{}", timestamp=now - 400)
    assert not names["is_ours"]("whsec_1", old, b"{}")


def test_the_documentation_names_every_address_and_error() -> None:
    text = (settings.BASE_DIR / "docs" / "rest.md").read_text(encoding="utf-8")
    for _, path, _ in operations():
        last = path.rpartition("/")[2]
        assert "{" in last or last in text, path
    for code in errors.HINTS:
        assert f"`{code}`" in text, code


@pytest.mark.parametrize("name", sorted(docs._EXAMPLES))
def test_the_examples_are_right(page: str, name: str) -> None:
    operation = next(one for _, _, one in operations() if one["operationId"] == name)
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    shown = re.search(rf'<pre id="curl-{name}">(.*?)</pre>', page, re.DOTALL)
    assert shown is not None
    data = re.search(r"-d '(.*)'", html.unescape(shown[1]))
    assert data is not None
    jsonschema_rs.validate({**body, "components": schema()["components"]}, json.loads(data[1]))


def test_every_body_has_an_example() -> None:
    for _, _, operation in operations():
        content = operation.get("requestBody", {}).get("content", {})
        assert ("application/json" in content) <= (operation["operationId"] in docs._EXAMPLES)
