"""Checks a file as the command line does, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from runs.datasets import doctor
from runs.datasets.report import Report

Check = Callable[..., Report]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return the folder that `check` writes to."""
    return tmp_path / "output"


@pytest.fixture
def check(tmp_path: Path, output: Path) -> Check:
    """Return a function that checks the content of a file and returns the report."""

    def call(
        content: bytes | str,
        filename: str = "rows.jsonl",
        *,
        mapping: Mapping[str, str] | None = None,
        options: tuple[str, ...] = (),
    ) -> Report:
        path = tmp_path / "original"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        arguments = [f"--input={path}", f"--filename={filename}", f"--output={output}"]
        doctor.main([*arguments, f"--mapping={json.dumps(mapping or {})}", *options])
        return Report.from_dict(json.loads((output / "report.json").read_bytes()))

    return call


def chat_line(*messages: tuple[Any, Any]) -> str:
    """Return a row of messages, given as (role, content), with its line end."""
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}) + "\n"


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Return the canonical rows that were written."""
    return [json.loads(line) for line in (output / "rows.jsonl").read_bytes().splitlines()]
