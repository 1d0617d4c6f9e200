"""The page of all checkpoints: a page at a time, sorted, searched and filtered by the address.

A page costs the same among a thousand checkpoints and a million: it enters the index of its order at the place where
the page before ended. What no index looks for is looked for among so many of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias
from urllib.parse import urlencode

from django.core import signing
from django.db.models import F, Lookup, Q, QuerySet
from django.db.models.fields.tuple_lookups import (
    Tuple,
    TupleGreaterThan,
    TupleGreaterThanOrEqual,
    TupleLessThan,
    TupleLessThanOrEqual,
)
from django.http import HttpRequest, HttpResponseBase, QueryDict
from django.shortcuts import render
from django.views.decorators.http import require_GET

from runs.models import Checkpoint, TrainingRun, User
from runs.pages import checkpoints
from runs.pages.policies import signed_in
from runs.services import access, disk, run_rows, tallies
from runs.services import checkpoints as service
from runs.services.tallies import Total

PAGE_SIZE: Final = 200
# Checkpoints that a search, or a filter without an index, goes through at once.
SEARCH_SPAN: Final = 10_000
_SALT: Final = "checkpoint-list"
# Where a checkpoint stands in the list: the value that it is sorted by, and its number.
Place: TypeAlias = tuple[datetime | int, int]


@dataclass(frozen=True, kw_only=True)
class Order:
    """An order that the list has an index for; `first` is what it begins with, `further` what comes later."""

    label: str
    column: str
    is_descending: bool
    first: str
    further: str


ORDERS: Final = {
    "newest": Order(
        label="Newest first", column="created_at", is_descending=True, first="newest", further="older"
    ),
    "oldest": Order(
        label="Oldest first", column="created_at", is_descending=False, first="oldest", further="newer"
    ),
    "largest": Order(
        label="Largest first", column="size_bytes", is_descending=True, first="largest", further="smaller"
    ),
}
_DEFAULT: Final = "newest"


@dataclass(frozen=True, kw_only=True)
class View:
    """What the address asks for; empty where it asks for nothing. `place` is where the page before ended."""

    search: str
    run_id: str
    kind: str
    sort: str
    place: Place | None

    @property
    def order(self) -> Order:
        """The order of the list."""
        return ORDERS[self.sort]

    @property
    def is_filtered(self) -> bool:
        """Whether some checkpoints are left out."""
        return bool(self.search or self.run_id or self.kind)

    def query(self, **changes: str) -> str:
        """Return the address of this view from its beginning, with some of it changed."""
        sort = "" if self.sort == _DEFAULT else self.sort
        values = {"q": self.search, "run": self.run_id, "kind": self.kind, "sort": sort, **changes}
        kept = {name: value for name, value in values.items() if value}
        return f"?{urlencode(kept)}" if kept else ""


@signed_in
@require_GET
def checkpoint_list(request: HttpRequest) -> HttpResponseBase:
    """Show a page of a person's checkpoints, and what they all take."""
    user: User = request.user  # type: ignore[assignment]
    view = _view_of(request.GET)
    run = access.runs_of(user).filter(public_id=view.run_id).first() if view.run_id else None
    rows, is_searched = _chosen(user, view, run)
    if view.place is not None:
        rows = rows.filter(_beyond(view.order, view.place))
    end = _end_of_span(rows, view.order) if is_searched else None
    if end is not None:
        rows = rows.filter(_up_to(view.order, end))
    found = list(_narrowed(rows, view)[: PAGE_SIZE + 1])
    place = _place_of(found[PAGE_SIZE - 1], view.order) if len(found) > PAGE_SIZE else end
    context = {
        "view": view,
        "order": view.order,
        "checkpoints": checkpoints.rows_of(found[:PAGE_SIZE]),
        "run": run,
        "run_title": run_rows.title_of(run) if run is not None else "",
        "total": _total(user, view, run),
        "kinds": Checkpoint.Kind.choices,
        "orders": [(name, order.label) for name, order in ORDERS.items()],
        "back": request.get_full_path(),
        "first_query": view.query(),
        "all_runs_query": view.query(run=""),
        "next_query": view.query(after=_cursor(view, place)) if place is not None else "",
        "num_searched": SEARCH_SPAN if place is not None and place == end else 0,
        "disk": disk.usage(),
    }
    return render(request, "checkpoints/checkpoint_list.html", context)


def _view_of(query: QueryDict) -> View:
    sort = query.get("sort", "")
    sort = sort if sort in ORDERS else _DEFAULT
    kind = query.get("kind", "")
    return View(
        search=query.get("q", "").replace("\0", "").strip()[:200],
        run_id=query.get("run", "").replace("\0", "").strip()[:200],
        kind=kind if kind in Checkpoint.Kind.values else "",
        sort=sort,
        place=_opened(query.get("after", ""), sort),
    )


def _chosen(user: User, view: View, run: TrainingRun | None) -> tuple[QuerySet[Checkpoint], bool]:
    """Return the checkpoints of the list in its order as far as an index knows them, and whether more is asked."""
    rows = access.checkpoints_of(user)
    if view.run_id:
        # Not by the owner, too: the database would choose among the indexes of both, and sometimes the worse.
        rows = Checkpoint.objects.filter(run=run, is_ephemeral=False).select_related("run")
    sign = "-" if view.order.is_descending else ""
    has_index = not view.run_id and view.order.column == "created_at"  # for a kind
    is_searched = bool(view.search or (view.kind and not has_index))
    return rows.order_by(f"{sign}{view.order.column}", f"{sign}pk"), is_searched


def _narrowed(rows: QuerySet[Checkpoint], view: View) -> QuerySet[Checkpoint]:
    if view.kind:
        rows = rows.filter(kind=view.kind)
    if view.search:
        named = Q(name__icontains=view.search) | Q(run__name__icontains=view.search)
        rows = rows.filter(named | Q(run__public_id__icontains=view.search))
    return rows


def _total(user: User, view: View, run: TrainingRun | None) -> Total | None:
    """Return how many there are and what they take; None where that is not known without reading them."""
    if view.search or view.kind:
        return None
    if view.run_id:
        return service.total_of_run(run, limit=SEARCH_SPAN) if run is not None else None
    return tallies.total_of(user, tallies.Kind.CHECKPOINTS)


# -- places --------------------------------------------------------------------------------------------


def _end_of_span(rows: QuerySet[Checkpoint], order: Order) -> Place | None:
    """Return the place of the last checkpoint that is looked at at once; None where that is all of them."""
    ends = list(rows.values_list(order.column, "pk")[SEARCH_SPAN - 1 : SEARCH_SPAN + 1])
    return ends[0] if len(ends) > 1 else None


def _beyond(order: Order, place: Place) -> Lookup[Any]:
    """Return the condition on what comes after a place: of both columns at once, as in the index.

    Checkpoints of one rank have the same size, so the first column alone would leave all of them to be passed over.
    """
    comparison = TupleLessThan if order.is_descending else TupleGreaterThan
    return comparison(Tuple(F(order.column), F("pk")), place)


def _up_to(order: Order, place: Place) -> Lookup[Any]:
    comparison = TupleGreaterThanOrEqual if order.is_descending else TupleLessThanOrEqual
    return comparison(Tuple(F(order.column), F("pk")), place)


def _place_of(checkpoint: Checkpoint, order: Order) -> Place:
    return getattr(checkpoint, order.column), checkpoint.pk


def _cursor(view: View, place: Place) -> str:
    value, pk = place
    plain = value.isoformat() if isinstance(value, datetime) else value
    return signing.dumps([view.sort, plain, pk], salt=_SALT)


def _opened(cursor: str, sort: str) -> Place | None:
    """Return the place of a cursor; None without one, and for one that is not ours or of another order."""
    try:
        held, value, pk = signing.loads(cursor, salt=_SALT)
    except (signing.BadSignature, UnicodeError):
        return None
    if held != sort:
        return None
    return (datetime.fromisoformat(value) if isinstance(value, str) else value), pk
