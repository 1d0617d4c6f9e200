"""What a page says after many rows were chosen and deleted."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest


def tell(request: HttpRequest, what: str, *, num_deleted: int, num_gone: int = 0) -> None:
    """Say how many were deleted, and how many had been since the page was made; `what` is one of them."""
    if num_deleted:
        messages.success(request, f"{num_deleted} {what}{_s_were(num_deleted)} deleted.")
    if num_gone:
        messages.info(request, f"{num_gone} {'was' if num_gone == 1 else 'were'} not there any more.")


def _s_were(number: int) -> str:
    return " was" if number == 1 else "s were"
