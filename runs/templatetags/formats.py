"""Filters that turn numbers and times into the words of a page; `static/js/format.js` says the same."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Final

from django import template
from django.utils import timezone

register = template.Library()

NOTHING: Final = "\u2013"
_SPACE: Final = "\u202f"
_UNITS: Final = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))


@register.filter
def count(value: int | None) -> str:
    """Return a whole number with narrow spaces between its thousands."""
    return NOTHING if value is None else f"{value:,}".replace(",", _SPACE)


@register.filter
def decimal(value: float | None) -> str:
    """Return a measured value with four significant digits."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("\u221e" if value > 0 else "-\u221e")
    if value == 0:
        return "0"
    if abs(value) < 0.001 or abs(value) >= 100_000:
        return f"{value:.3e}"
    text = f"{value:#.4g}"
    return text.removesuffix(".")


@register.filter
def rate(value: float | None) -> str:
    """Return a rate in short form: 950, 1.2k, 3.4M."""
    if value is None or not math.isfinite(value):
        return NOTHING
    for limit, divisor, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.1f}{suffix}"
    return f"{value:,.0f}".replace(",", _SPACE) if abs(value) >= 10 else f"{value:.1f}"


@register.filter
def filesize(num_bytes: int | None) -> str:
    """Return a size in decimal units."""
    if num_bytes is None:
        return NOTHING
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@register.filter
def duration(seconds: float | None) -> str:
    """Return a duration: 12 ms, 3.4 s, 5 min 2 s, 2 h 10 min."""
    if seconds is None:
        return NOTHING
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


@register.filter
def ago(moment: datetime | None) -> str:
    """Return how long ago, or in how long, a moment is."""
    if moment is None:
        return "never"
    seconds = (timezone.now() - moment).total_seconds()
    size = abs(seconds)
    if size < 45:
        return "just now" if seconds >= 0 else "in a moment"
    number, unit = next((f"{size / length:.0f}", unit) for length, unit in _UNITS if size >= length * 0.75)
    return f"{number} {unit} ago" if seconds > 0 else f"in {number} {unit}"


@register.filter
def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    return NOTHING if share is None else f"{share * 100:.0f} %"
