"""Datasets as people upload them, checked by the real doctor: for tests of pages and for screenshots."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from runs.models import Dataset, DatasetVersion, User
from runs.services import dataset_checks, datasets

HOSTILE = "<img src=x onerror=alert(1)>{{ 7|add:7 }}"


def chat_line(question: str, answer: str) -> str:
    """Return a row of one question and its answer."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def chats(num_rows: int) -> str:
    """Return a file of different conversations."""
    return "".join(
        chat_line(f"What is {n} plus {n}?", f"{n} plus {n} is {2 * n}." * (1 + n % 9))
        for n in range(num_rows)
    )


def add_version(
    user: User,
    content: str | bytes,
    *,
    filename: str = "rows.jsonl",
    name: str = "",
    description: str = "",
    dataset: Dataset | None = None,
) -> DatasetVersion:
    """Take in a file, not checked yet."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return datasets.create_version(
        user, path=Path(file.name), filename=filename, name=name, description=description, dataset=dataset
    )


def checked(version: DatasetVersion) -> DatasetVersion:
    """Have the doctor look at a version that waits for it."""
    dataset_checks.check(version.pk)
    version.refresh_from_db()
    return version


def add_checked(user: User, content: str | bytes, **values: str) -> DatasetVersion:
    """Take in a file and have it checked."""
    filename, name = values.get("filename", "rows.jsonl"), values.get("name", "")
    description = values.get("description", "")
    return checked(add_version(user, content, filename=filename, name=name, description=description))


def add_talk(user: User) -> DatasetVersion:
    """Take in one conversation of two questions, and have it checked."""
    turns = [("user", "First?"), ("assistant", "Alpha."), ("user", "Second?"), ("assistant", "Omega.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    return add_checked(user, json.dumps(row) + "\n")
