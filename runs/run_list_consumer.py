"""The socket of the list of runs: rows that changed, runs that come into it, and how the server itself is doing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from django.db.models import Q, QuerySet
from django.template.loader import render_to_string
from django.utils import timezone

from runs import events
from runs.consumers import LiveConsumer, in_thread
from runs.models import TrainingRun
from runs.services import base_models, run_rows, workers
from runs.services.run_rows import MAX_WATCHED_ROWS, Place

MAX_NEW_ROWS: Final = 20


@dataclass
class _List:
    """What one page shows, in its order, as far as it was told.

    Args:
        takes_new: runs that come into the list, as into a first page without a search.
        newest_pk: the highest number of the runs so far; None before the first look.
        since: where the last run stood at the first look; None in an empty list.
        has_more: more runs come into the list than were read at once.
        html, server: the markup that was sent.
    """

    watched: list[str] = field(default_factory=list)
    takes_new: bool = False
    owes_answer: bool = True
    newest_pk: int | None = None
    since: Place | None = None
    has_more: bool = False
    places: dict[str, Place] = field(default_factory=dict)
    html: dict[str, str] = field(default_factory=dict)
    server: str = ""

    def begin(self, found: Iterable[TrainingRun]) -> None:
        """Take what the page shows at the first look for what there was before."""
        self.newest_pk = max((run.pk for run in found), default=0)
        if self.places:  # of two clocks one may be ahead
            self.since = min([*self.places.values(), (timezone.now(), 0)])

    def newcomers(self, runs: QuerySet[TrainingRun]) -> list[TrainingRun]:
        """Return runs that the list lacks and that a reload would show: what did nothing since is on a later page.

        A full list takes in those alone that are new: else runs that all train would push one another off for ever.
        """
        later = runs.exclude(public_id__in=self.watched)
        if self.since is not None:
            active_at, pk = self.since
            later = later.filter(Q(active_at__gt=active_at) | Q(pk__gt=pk), Q(active_at__gte=active_at))
        if len(self.watched) >= MAX_WATCHED_ROWS:
            later = later.filter(pk__gt=self.newest_pk)
        # The oldest first, so that what does not fit comes with the next message.
        return list(later.order_by("pk")[:MAX_NEW_ROWS])

    def put(self, run: TrainingRun) -> str | None:
        """Put a run in and return before which one: a new one first, another one by when it did something last."""
        place = self.places[run.public_id] = run_rows.place_of(run)
        is_new = run.pk > (self.newest_pk or 0)
        index = 0
        while not is_new and index < len(self.watched) and self.places[self.watched[index]] > place:
            index += 1
        before = self.watched[index] if index < len(self.watched) else None
        self.watched.insert(index, run.public_id)
        return before

    def keep(self, html: dict[str, str]) -> None:
        """Go on with the rows that the page keeps: the last ones are pushed off by those that came."""
        self.watched = self.watched[:MAX_WATCHED_ROWS]
        self.places = {run_id: self.places[run_id] for run_id in self.watched}
        sent = {**self.html, **html}
        self.html = {run_id: sent[run_id] for run_id in self.watched if run_id in sent}


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What was found: rows as markup, runs that come into the list, those that are gone, and the server's state.

    `server` is nothing where nobody asked for it.
    """

    html: dict[str, str]
    newcomers: list[TrainingRun]
    gone: set[str]
    server: str


class RunListConsumer(LiveConsumer):
    """The list of runs: `{"rows": [ids], "is_first_page": bool}` from the page, then `{"rows": [...], "server"?}` to it.

    A row is `{"run", "html", "is_new": false}`. With `is_new` the page lacks it, and `before` is the run that it
    goes before, null for the end. A run that was deleted comes as `{"run", "is_gone": true}`. `server` is the
    markup of the parts about workers and base models: with the first message, then when it is another one.
    """

    interval_s = 0.5

    def _open(self) -> str:
        self._list = _List()
        return events.owner_group(self.user.pk)

    def _take(self, message: dict[str, Any]) -> None:
        rows = message.get("rows")
        if (
            not isinstance(rows, list)
            or len(rows) > MAX_WATCHED_ROWS
            or not all(isinstance(r, str) for r in rows)
        ):
            raise ValueError("rows is a list of run ids")
        self._list = _List(watched=rows, takes_new=message.get("is_first_page") is True)

    async def _send_news(self, hinted: set[str], *, is_self_check: bool) -> None:
        page = self._list
        wants_all = is_self_check or page.owes_answer
        look = await in_thread(lambda: self._look(page, None if wants_all else hinted))
        if page is not self._list:  # the page has just told anew what it shows
            return
        message = _message(page, look)
        if message["rows"] or "server" in message or is_self_check or page.owes_answer:
            page.owes_answer = False
            await self.send(json.dumps(message, separators=(",", ":")))
        if page.has_more:
            self._news.set()

    def _look(self, page: _List, hinted: set[str] | None) -> _Look:
        """Read the hinted runs, or all that the page shows and the state of the server; runs in a thread."""
        runs = run_rows.by_activity(self.user)
        watched = set(page.watched)
        shown = watched if hinted is None else hinted & watched
        found = list(runs.filter(public_id__in=shown)[:MAX_WATCHED_ROWS])
        page.places |= {run.public_id: run_rows.place_of(run) for run in found}
        if page.newest_pk is None:
            page.begin(found)
        is_due = hinted is None or page.has_more or not hinted <= watched
        newcomers = page.newcomers(runs) if page.takes_new and is_due else []
        rows = run_rows.rows_of([*found, *newcomers])
        return _Look(
            html={row.run_id: render_to_string("runs/_run_row.html", {"row": row}) for row in rows},
            newcomers=newcomers,
            gone=shown - {run.public_id for run in found},
            server=_server() if hinted is None else "",
        )


def _message(page: _List, look: _Look) -> dict[str, Any]:
    """Return what the page has to hear of a look, and take it for told."""
    page.watched = [run_id for run_id in page.watched if run_id not in look.gone]
    before = {run.public_id: page.put(run) for run in look.newcomers}
    page.newest_pk = max([page.newest_pk or 0, *(run.pk for run in look.newcomers)])
    page.has_more = len(look.newcomers) >= MAX_NEW_ROWS
    changed = {run_id: html for run_id, html in look.html.items() if page.html.get(run_id) != html}
    page.keep(changed)
    rows: list[dict[str, Any]] = [
        {"run": run_id, "html": html, "is_new": True, "before": before[run_id]}
        if run_id in before
        else {"run": run_id, "html": html, "is_new": False}
        for run_id, html in changed.items()
    ]
    message: dict[str, Any] = {"rows": [*rows, *({"run": run_id, "is_gone": True} for run_id in look.gone)]}
    if look.server and look.server != page.server:
        page.server = message["server"] = look.server
    return message


def _server() -> str:
    """Return the parts of the page that tell how the server is doing."""
    state = {"models": base_models.available(), "outlook": workers.outlook()}
    return "".join(
        render_to_string(template, state) for template in ("runs/_warnings.html", "runs/_models.html")
    )
