"""Lists by pages: sorted by one column and the row's number, so that rows that come and go shift nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Generic, TypeVar

from django.core import signing
from django.db.models import Model, Q, QuerySet
from pydantic import BaseModel, Field

from runs.exceptions import RequestInvalid

_SALT: Final = "rest-cursor"

Row = TypeVar("Row", bound=Model)
Item = TypeVar("Item", bound=BaseModel)

Limit = Annotated[int, Field(ge=1, le=200, description="How many to return.")]
Cursor = Annotated[
    str | None, Field(max_length=1000, description="`next_cursor` of the page before; nothing for the first.")
]


class Page(BaseModel, Generic[Item]):
    """A page of a list."""

    items: list[Item]
    next_cursor: str | None = Field(description="Ask with it for the next page; null on the last one.")


def page(
    rows: QuerySet[Row],
    *,
    sort: str,
    cursor: str | None,
    limit: int,
    scope: str,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Row], str | None]:
    """Return a page of rows and the cursor of the next.

    Args:
        sort: a column, with - before it for the largest first.
        scope: which list it is; a cursor opens only its own.
        columns: the field of each sort name where that differs.
    Raises:
        RequestInvalid: the cursor is not one of this list in this order.
    """
    name = sort.removeprefix("-")
    column, is_descending = (columns or {}).get(name, name), sort.startswith("-")
    if cursor is not None:
        value, pk = unpack(cursor, scope=f"{scope} {sort}")
        rows = rows_after(rows, column, value, pk, comparison="lt" if is_descending else "gt")
    sign = "-" if is_descending else ""
    found = list(rows.order_by(f"{sign}{column}", f"{sign}pk")[: limit + 1])
    if len(found) <= limit:
        return found, None
    last = found[limit - 1]
    return found[:limit], pack([_plain(_value(last, column)), last.pk], scope=f"{scope} {sort}")


def rows_after(rows: QuerySet[Row], column: str, value: Any, pk: int, *, comparison: str) -> QuerySet[Row]:
    """Keep the rows behind a position; the first condition alone lets the database enter an index there."""
    beyond = Q(**{f"{column}__{comparison}": value}) | Q(**{f"pk__{comparison}": pk})
    return rows.filter(beyond, **{f"{column}__{comparison}e": value})


def page_of(
    rows: QuerySet[Row],
    item: Callable[[Row], Item],
    *,
    sort: str,
    cursor: str | None,
    limit: int,
    scope: str,
    columns: Mapping[str, str] | None = None,
) -> Page[Item]:
    """Return a page of rows, each as `item` shows it."""
    found, following = page(rows, sort=sort, cursor=cursor, limit=limit, scope=scope, columns=columns)
    return Page[Item].model_construct(items=[item(row) for row in found], next_cursor=following)


def pack(position: Sequence[Any], *, scope: str) -> str:
    """Return a position as an opaque, signed cursor."""
    return signing.dumps([scope, *position], salt=_SALT)


def unpack(cursor: str, *, scope: str) -> list[Any]:
    """Return the position of a cursor.

    Raises:
        RequestInvalid: we did not make it, or for another list.
    """
    try:
        content: list[Any] = signing.loads(cursor, salt=_SALT)
    except (signing.BadSignature, UnicodeError):
        raise RequestInvalid("is no cursor of this server", place="cursor") from None
    held, *position = content
    if held != scope:
        raise RequestInvalid("is a cursor of another list or another order", place="cursor")
    return position


def _value(row: Model, column: str) -> Any:
    value: Any = row
    for part in column.split("__"):
        value = getattr(value, part)
    return value


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
