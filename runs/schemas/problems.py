"""Collects what is wrong with a request, names each place, and raises one error for all of it."""

from __future__ import annotations

from collections.abc import Iterable

from runs.exceptions import RequestInvalid

MAX_SHOWN = 20
MAX_VALUE_CHARS = 80


def show(value: object) -> str:
    """Return the value for a message: ASCII, escaped, at most 80 characters."""
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = ascii(value[: MAX_VALUE_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


def place_of(location: Iterable[int | str], prefix: str = "") -> str:
    """Return `data[3].loss_fn_inputs.weights[7]` for the keys and indices that lead to a value."""
    place = prefix
    for step in location:
        if isinstance(step, int):
            place += f"[{step}]"
        else:
            name = step if step.isidentifier() else show(step)
            place += f".{name}" if place else name
    return place


class Problems:
    """Up to 20 problems with their places, and the count of all of them."""

    def __init__(self) -> None:
        self.total = 0
        self._shown: list[tuple[str, str]] = []

    def add(self, message: str, *, place: str) -> None:
        self.total += 1
        if len(self._shown) < MAX_SHOWN:
            self._shown.append((place, message))

    def add_error(self, error: RequestInvalid) -> None:
        self.add(error.message, place=error.place)

    def raise_if_any(self) -> None:
        """Raise one RequestInvalid at the first place, with the others in its message.

        Raises:
            RequestInvalid: at least one problem was added.
        """
        if not self._shown:
            return
        (place, message), *others = self._shown
        if others:
            listed = "; ".join(f"{where}: {what}" if where else what for where, what in others)
            hidden = "" if self.total <= MAX_SHOWN else "; ..."
            message = f"{message} (1 of {self.total} errors, then {listed}{hidden})"
        raise RequestInvalid(message, place=place, problems=self._shown)
