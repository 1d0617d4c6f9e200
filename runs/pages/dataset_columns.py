"""Which column of a file holds what, to be chosen on its dataset's page: at first, or anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from runs.datasets import formats
from runs.datasets.file_names import types_in
from runs.models import DatasetVersion
from runs.services import dataset_uses

MAX_COLUMNS: Final = 200
# As many characters of a column's name does the report's sample keep.
_NAME_CHARS: Final = 200
# What a column may hold, by the format it belongs to.
PARTS: Final = (
    ("Prompt and completion", (("prompt", "prompt"), ("completion", "completion"))),
    ("Conversation", (("messages", "messages (role, content)"), ("conversations", "turns (from, value)"))),
    (
        "Instruction",
        (
            ("instruction", "instruction"),
            ("input", "input, added to the instruction"),
            ("output", "output"),
        ),
    ),
    ("Raw text", (("text", "text"),)),
    ("Beside them", (("system", "system message"), ("tools", "tools"))),
    ("Preferences", (("chosen", "chosen answer"), ("rejected", "rejected answer"))),
    ("Prompts", (("reference", "reference answer"),)),
)
_TYPES: Final = {"jsonl": "JSON", "json": "JSON", "csv": "a table", "text": "plain text"}
State = DatasetVersion.State


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a file, with a few of its values; `part` is what it holds, empty if it is not used."""

    name: str
    part: str
    values: list[str]


@dataclass(frozen=True, kw_only=True)
class Mapper:
    """The choice of a version's columns.

    Args:
        is_needed: whether the doctor asks for it; else it can be made anew.
        is_frozen: whether runs use the version, so that nothing can be chosen.
        type: what the file was read as, where its name has a say in it.
    """

    columns: list[Column]
    is_needed: bool
    is_frozen: bool
    type: str

    @property
    def title(self) -> str:
        """Return what the choice is called; plain text has no columns."""
        return (
            "Read the columns differently" if self.columns or self.is_frozen else "Read the file differently"
        )


def mapper_of(version: DatasetVersion) -> Mapper | None:
    """Return what can be chosen for a version, None while it is checked and where nothing can be."""
    if version.state == State.CHECKING or not version.report.get("columns"):
        return None
    container = version.report.get("container", "")
    type = _TYPES.get(container, "") if types_in(version.filename) else ""
    if container == "text":
        return Mapper(columns=[], is_needed=False, is_frozen=False, type=type) if type else None
    is_needed = version.state == State.NEEDS_MAPPING
    is_frozen = not is_needed and dataset_uses.is_used(version)
    columns = [] if is_frozen else _columns(version)
    return Mapper(columns=columns, is_needed=is_needed, is_frozen=is_frozen, type=type)


def _columns(version: DatasetVersion) -> list[Column]:
    report = version.report
    parts = {column: part for part, column in _mapping(version).items()}
    return [
        Column(
            name=name,
            part=parts.get(name, ""),
            values=[row.get(name[:_NAME_CHARS], "") for row in report.get("sample", [])],
        )
        for name in report["columns"][:MAX_COLUMNS]
    ]


def _mapping(version: DatasetVersion) -> Mapping[str, str]:
    """Return the columns as they were chosen, else as the doctor has read or would read them."""
    if version.mapping:
        chosen: Mapping[str, str] = version.mapping
        return chosen
    report = version.report
    if report.get("format"):
        return formats.columns_of(report["format"], report["columns"])
    suggested: Mapping[str, str] = report.get("suggested_mapping", {})
    return suggested
