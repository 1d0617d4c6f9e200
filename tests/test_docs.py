"""The documentation: links lead somewhere, and what can be read off the code agrees with it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from runs import exceptions
from runs.datasets.formats import FORMATS, format_of
from runs.pages.dataset_list import FILE_TYPES
from runs.schemas.recipes import SftConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "sdk/README.md", "gpuworker/tiny/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# Told in a result, not by a status.
NO_STATUS = {"operation_failed"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file), target


def test_every_page_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[2:]:
        assert f"({page.relative_to(ROOT)})" in readme


def test_every_setting_of_a_recipe_is_in_its_table() -> None:
    section = _section("recipes.md", "Supervised fine-tuning")
    named = set(re.findall(r"`(?:\w*\.)?(\w+)`", section))
    assert set(_settings(SftConfig)) - {"recipe"} <= named


def test_the_table_of_formats_is_that_of_the_code() -> None:
    rows = [line.split(" | ") for line in _section("recipes.md", "Datasets").splitlines() if "| `{" in line]
    found: list[str] = []
    for _, columns, example in rows:
        plan = format_of(json.loads(example.strip("| `")))
        assert plan is not None, example
        aliases = {name for names in FORMATS[plan.format].parts.values() for name in names}
        assert set(re.findall(r"`(\w+)`", columns)) == aliases
        found.append(plan.format)
    assert found == [name for name in FORMATS if name != "chat_completion"]


def test_every_type_of_file_is_named() -> None:
    section = _section("recipes.md", "Datasets")
    for suffix in FILE_TYPES.split(","):
        assert f"`{suffix}`" in section, suffix


def test_every_error_code_is_in_a_table() -> None:
    text = (ROOT / "docs/sdk.md").read_text() + (ROOT / "docs/rest.md").read_text()
    for error in _subclasses(exceptions.MintError):
        row = rf"^\| {error.http_status} \|.*`{error.code}`"
        assert error.code in NO_STATUS or re.search(row, text, re.MULTILINE), error.code


def test_the_layers_of_the_worker_are_those_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (one["layers"] for one in contracts if one["name"] == "The worker imports only downwards")
    block = re.search(r"```\n(tasks\n.*?)```", _section("architecture.md", "Who imports whom"), re.DOTALL)
    assert block is not None
    shown = [sorted(line.split(", ")) for line in block[1].splitlines()]
    assert shown == [sorted(name.removeprefix("gpuworker.") for name in line.split(" | ")) for line in layers]


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", _without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _section(name: str, title: str) -> str:
    """Return the text under a heading of the second level that begins so."""
    found = re.search(
        rf"^## {title}.*?(?=^## |\Z)", (ROOT / "docs" / name).read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, title
    return found[0]


def _settings(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner: Any = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _settings(inner)
        else:
            yield name


def _subclasses(kind: type[exceptions.MintError]) -> Iterator[type[exceptions.MintError]]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)
