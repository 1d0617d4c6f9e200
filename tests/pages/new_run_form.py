"""The form of a new run as a browser sees and sends it, and what it takes to fill it in."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from django.test import Client

from runs.models import DatasetVersion, Recipe, User, Worker
from runs.services import base_models
from runs.services.base_models import ModelSizes
from tests.pages import recipe_seed, seed

NEW = "/runs/new/"
JSON = {"accept": "application/json"}
Form = dict[str, list[str]]
# As the worker reports them for the model that ships with mintweb.
SIZES = {
    "weight_bytes": 14_691_328,
    "attn_width": 7_168,
    "mlp_width": 12_288,
    "unembed_width": 2_304,
    "working_bytes": 0,
    "row_bytes": 98_304,
    "batch_rows": 2_048,
    "head_bytes": 12_582_912,
}


class FormReader(HTMLParser):
    """Collects what the form of a new run would send, and the errors at its fields."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: Form = {}
        self.errors: dict[str, str] = {}
        self._is_inside = False
        self._select: tuple[str, list[tuple[str, bool]]] | None = None
        self._textarea: str | None = None
        self._place = ""
        self._is_error = False
        self._text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "form":
            self._is_inside = given.get("id") == "new-run"
        self._place = given.get("data-field") or self._place
        self._is_error = "data-error" in given
        self._text = ""
        if not self._is_inside or "disabled" in given:
            return
        name = given.get("name") or ""
        if tag == "select":
            self._select = (name, [])
        elif tag == "option" and self._select is not None:
            self._select[1].append((given.get("value") or "", "selected" in given))
        elif tag == "textarea":
            self._textarea = name
        elif (
            tag == "input" and name and (given.get("type") not in ("checkbox", "radio") or "checked" in given)
        ):
            self._add(name, given.get("value") or "")

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "select" and self._select is not None:
            name, options = self._select
            chosen = [value for value, is_chosen in options if is_chosen] or [value for value, _ in options]
            for value in chosen[:1]:
                self._add(name, value)
            self._select = None
        elif tag == "textarea" and self._textarea is not None:
            self._add(self._textarea, self._text.removeprefix("\n"))
            self._textarea = None
        elif tag == "p" and self._is_error and self._text:
            self.errors[self._place] = self._text
        elif tag == "form":
            self._is_inside = False
        self._is_error = False

    def _add(self, name: str, value: str) -> None:
        self.fields.setdefault(name, []).append(value)


def read(html: str) -> FormReader:
    """Return the form in a page."""
    reader = FormReader()
    reader.feed(html)
    reader.fields.pop("csrfmiddlewaretoken", None)
    return reader


def opened(page: Client, query: str = "") -> Form:
    """Return the form as the page shows it."""
    reply = page.get(f"{NEW}{query}")
    assert reply.status_code == 200, reply.content
    return read(reply.content.decode()).fields


def filled(page: Client, *, query: str = "", **changes: str | list[str]) -> Form:
    """Return the form with some fields filled in; a double underscore in a name stands for a dot."""
    given = {name.replace("__", "."): value for name, value in changes.items()}
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    return {**opened(page, query), **lists}


def send(page: Client, form: Form, *, query: str = "", action: str = "") -> Any:
    """Send the form and return the answer as JSON data, with its status as `status`."""
    reply = page.post(f"{NEW}{action}{query}", form, headers=JSON)
    return {**reply.json(), "status": reply.status_code}


def config_of(answer: Any) -> dict[str, Any]:
    """Return the settings of the run that an answer says was started."""
    assert answer["status"] == 201, answer
    config: dict[str, Any] = Recipe.objects.get(run__public_id=answer["run_id"]).config
    return config


def problems_of(answer: Any) -> dict[str, str]:
    """Return place -> message of an answer."""
    return {problem["place"]: problem["message"] for problem in answer["problems"]}


def make_dataset(
    user: User, *, number: int = 1, num_rows: int = 400, mean_tokens: int = 20, longest: int = 30
) -> DatasetVersion:
    """Enter a ready dataset of chat rows, each of one question and one answer, as the doctor reports it.

    Half of its rows have between 10 and `mean_tokens` tokens, the others up to `longest`.
    """
    version = recipe_seed.make_dataset(user, name=f"questions {number}", number=number)
    version.num_rows = num_rows
    version.report = {
        "roles": {"user": num_rows, "assistant": num_rows},
        "tokens": {
            seed.MODEL: {
                "total": mean_tokens * num_rows,
                "max": longest,
                "histogram": [
                    {"low": 10, "high": mean_tokens, "count": num_rows // 2},
                    {"low": mean_tokens, "high": longest, "count": num_rows - num_rows // 2},
                ],
            }
        },
    }
    version.save(update_fields=["num_rows", "report"])
    return version


def make_sizes(worker: Worker, **changes: int) -> None:
    """Let a worker report what training on the base model takes."""
    info = base_models.find(seed.MODEL)
    assert info is not None
    base_models.report(worker, replace(info, sizes=ModelSizes(**{**SIZES, **changes})))


def ref(version: DatasetVersion) -> str:
    """Return the reference of a dataset version."""
    return f"{version.dataset.public_id}@{version.number}"
