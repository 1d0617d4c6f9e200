"""A run's events: as a list on its page, and as the marks under its loss chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from runs.models import RunEvent, TrainingRun
from runs.pages import event_words

MAX_EVENTS: Final = 300
NUM_SHOWN: Final = 20
_TONES: Final = {
    "recovered": "good",
    "restored": "idle",
    "diverged": "bad",
    "step_skipped": "warn",
    "not_finite": "warn",
    "failed": "bad",
    "save_failed": "bad",
    "evaluation_failed": "bad",
    "saved": "good",
    "best": "good",
    "started": "good",
    "resumed": "good",
    "changed": "busy",
    "extended": "busy",
    "forked": "busy",
    "retried": "warn",
    "paused": "warn",
    "stopping": "warn",
    "early_stopped": "done",
    "finished": "done",
    "stopped": "done",
    "discarded": "bad",
}
# Of these a run may have hundreds: they have a mark in the lane, but no line through the chart.
_QUIET: Final = ("saved", "evaluated", "best", "restored")


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """What the page shows of an event."""

    pk: int
    kind: str
    title: str
    tone: str
    step: int
    created_at: datetime
    details: list[tuple[str, str]]
    is_quiet: bool


def rows_of(run: TrainingRun) -> list[EventRow]:
    """Return the run's newest events, the newest first."""
    events = RunEvent.objects.filter(run=run).order_by("-id")[:MAX_EVENTS]
    return [_row(event) for event in events]


def marks_of(rows: Sequence[EventRow], *, best_step: int | None) -> str:
    """Return what the charts mark, as JSON: the events, the oldest first, and the step of the best weights."""
    events = [
        {
            "key": row.pk,
            "kind": row.kind,
            "title": row.title,
            "tone": row.tone,
            "step": row.step,
            "time": round(row.created_at.timestamp(), 3),
            "detail": "; ".join(f"{key} {value}" for key, value in row.details),
            "isQuiet": row.is_quiet,
        }
        for row in reversed(rows)
    ]
    return json.dumps({"events": events, "bestStep": best_step}, separators=(",", ":"))


def _row(event: RunEvent) -> EventRow:
    return EventRow(
        pk=event.pk,
        kind=event.kind.replace("_", " "),
        title=event_words.title_of(event),
        tone=_TONES.get(event.kind, "idle"),
        step=event.step,
        created_at=event.created_at,
        details=event_words.details_of(event),
        is_quiet=event.kind in _QUIET,
    )
