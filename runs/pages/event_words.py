"""A run's events in words, for the list of events and the marks on its charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from runs.models import RunEvent

Details = list[tuple[str, str]]
_MAX_VALUE_CHARS: Final = 300
_TITLES: Final = {
    "recovered": "recovered, nothing lost",
    "restored": "picked up where it was left",
    "step_skipped": "step skipped: gradient not finite",
    "not_finite": "loss or gradient not finite",
}


def title_of(event: RunEvent) -> str:
    """Return what happened, in a few words."""
    if event.kind == "recovered" and "took_s" not in event.detail:
        return "recovered"
    return _TITLES.get(event.kind, event.kind.replace("_", " "))


def details_of(event: RunEvent) -> Details:
    """Return what else there is to say, as pairs of a word and a value."""
    tell = _DETAILS.get(event.kind)
    found = tell(event.detail) if tell else []
    return found or [(str(key).replace("_", " "), _shown(value)) for key, value in event.detail.items()]


def _return(detail: Mapping[str, Any]) -> Details:
    if "num_replayed" not in detail:
        return []
    number = detail["num_replayed"]
    told = [("replayed", f"{number} operation{'' if number == 1 else 's'}")]
    if "took_s" in detail:
        told.append(("back after", f"{detail['took_s']:.1f} s"))
    if "engine" in detail:
        told.append(
            ("replayed on another engine" if number else "goes on on another engine", detail["engine"])
        )
    if number and "largest_difference" in detail:
        told.append(("largest difference", f"{detail['largest_difference']:.2g}"))
    return told


def _divergence(detail: Mapping[str, Any]) -> Details:
    if "operation" not in detail or "seq" not in detail:
        return []
    return [
        ("operation", f"{detail['seq']} ({detail['operation']})"),
        ("because", _shown(detail.get("reason", ""))),
    ]


_DETAILS: Final[Mapping[str, Callable[[Mapping[str, Any]], Details]]] = {
    "recovered": _return,
    "restored": _return,
    "diverged": _divergence,
}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)[:_MAX_VALUE_CHARS]
