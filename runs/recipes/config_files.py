"""A run's settings as text: a YAML file to keep, and the same run as a REST request in Python and curl."""

from __future__ import annotations

import json
import pprint
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from runs.exceptions import RequestInvalid
from runs.schemas.problems import show
from runs.schemas.recipes import SftConfig

MAX_CHARS: Final = 100_000
MAX_DEPTH: Final = 8
_WIDTH: Final = 100


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What a YAML file holds; `lines` gives the line, from 1, of each place in it."""

    name: str
    values: dict[str, Any]
    lines: dict[str, int]

    def line_of(self, place: str) -> int | None:
        """Return the line of a place, or of what it is in."""
        while place and place not in self.lines:
            place = max(place.rpartition("[")[0], place.rpartition(".")[0], key=len)
        return self.lines.get(place)

    def told(self, problems: Iterable[tuple[str, str]]) -> list[str]:
        """Return each (place, message) as a sentence that begins with its line."""
        sentences = []
        for place, message in problems:
            line = self.line_of(place)
            where = f"line {line}, {place}" if line is not None else place
            sentences.append(f"{where}: {message}" if where else message)
        return sentences


def as_values(config: SftConfig) -> dict[str, Any]:
    """Return the settings as plain values; those that a rule decides are left out."""
    return config.model_dump(mode="json", exclude_none=True)


def to_yaml(config: SftConfig, *, name: str) -> str:
    """Return a YAML file that `from_yaml` reads back to the same settings and name."""
    values = {"name": name, **as_values(config)} if name else as_values(config)
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return text


def from_yaml(text: str) -> ConfigFile:
    """Return what a YAML (or JSON) file holds, not yet checked against the schema.

    Raises:
        RequestInvalid: it is no YAML of plain values; the message names the line.
    """
    if len(text) > MAX_CHARS:
        raise RequestInvalid(f"the file has {len(text)} characters, the limit is {MAX_CHARS}", place="text")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            values = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # PyYAML lets 2026-13-45 and !!int x through as ValueError
        raise RequestInvalid(_in_words(error), place="text") from error
    if not isinstance(values, dict):
        raise RequestInvalid(
            f"the file must hold settings, one 'name: value' a line, got {show(values)}", place="text"
        )
    lines = dict(_lines(node, ""))
    name = values.pop("name", "")
    if not isinstance(name, str):
        raise RequestInvalid(f"line {lines['name']}: name must be text, got {show(name)}", place="text")
    return ConfigFile(name=name, values={str(key): value for key, value in values.items()}, lines=lines)


def to_python(config: SftConfig, *, name: str, base_url: str) -> str:
    """Return a script that starts the run through REST."""
    body = pprint.pformat(_body(config, name), sort_dicts=False, width=_WIDTH - 10)
    return f"""import os

import requests

config = {body}

answer = requests.post(
    {base_url + "/rest/v1/runs"!r},
    headers={{"X-API-Key": os.environ["MINT_API_KEY"]}},
    json=config,
    timeout=30,
)
answer.raise_for_status()
print(answer.json())
"""


def to_curl(config: SftConfig, *, name: str, base_url: str) -> str:
    """Return a shell command that starts the run through REST; the quoted here-document needs no escapes."""
    body = json.dumps(_body(config, name), indent=2, ensure_ascii=False)
    return f"""curl --fail-with-body {base_url}/rest/v1/runs \\
  --header "X-API-Key: $MINT_API_KEY" \\
  --header "Content-Type: application/json" \\
  --data @- <<'JSON'
{body}
JSON
"""


def _body(config: SftConfig, name: str) -> dict[str, Any]:
    return {"name": name, **as_values(config)} if name else as_values(config)


class _Loader(yaml.SafeLoader):
    """Plain values only: no aliases, which can blow a small file up, no deep nesting, no key twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose a node, unless it repeats another or lies too deep."""
        if self.check_event(AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias (*) is not taken here", mark)
        if self._depth >= MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        self._depth += 1
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_scalar(self, node: ScalarNode | MappingNode) -> str:
        """Build a text; JSON writes a letter beyond 16 bits as the two escapes of a surrogate pair."""
        value: str = super().construct_scalar(node)
        return value.encode("utf-16", "surrogatepass").decode("utf-16")

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping whose keys differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name must be text", key.start_mark)
            if key.value in seen:
                what = f"{show(key.value)} comes twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value)
        values: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return values


def _lines(node: Node | None, place: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            inner = f"{place}.{key.value}" if place else str(key.value)
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, SequenceNode):
        for number, value in enumerate(node.value):
            yield f"{place}[{number}]", value.start_mark.line + 1
            yield from _lines(value, f"{place}[{number}]")


def _in_words(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    if mark is None:
        return f"not valid YAML: {problem}"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
