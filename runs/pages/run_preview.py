"""What a run would come to, in the words of the card beside its form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from runs.recipes.estimates import Amounts, Disk, Estimate, Turn
from runs.recipes.footprint import Fit, Memory
from runs.services import recipe_facts
from runs.templatetags import formats

_TONES: Final = {Fit.FITS: "good", Fit.TIGHT: "warn", Fit.TOO_LARGE: "bad", Fit.UNKNOWN: "idle"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One fact of the card; `note` explains it, `tone` colours it."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


def lines_of(estimate: Estimate) -> list[Line]:
    """Return the card's facts in order."""
    amounts = estimate.amounts
    return [
        Line(label="Steps", value=f"{formats.count(amounts.num_steps)}", note=_epochs(amounts)),
        Line(
            label="Rows",
            value=f"{formats.count(amounts.num_train_rows)} to train on",
            note=_held_out(amounts),
        ),
        _tokens(amounts),
        _truncated(amounts, estimate.config.max_length or 0),
        _time(estimate),
        _memory(estimate.memory),
        _disk(estimate.disk),
        _start(estimate.turn),
    ]


def summary_of(estimate: Estimate) -> str:
    """Return the card in one short line, for a narrow screen."""
    steps = f"{formats.count(estimate.amounts.num_steps)} steps"
    times = estimate.time_range_s
    time = f", {recipe_facts.time_range(*times)}" if times is not None else ""
    fit = "" if estimate.memory.fit is Fit.UNKNOWN else f", {estimate.memory.fit}"
    return f"{steps}{time}{fit}"


def _epochs(amounts: Amounts) -> str:
    return f"sees each row {amounts.num_epochs:.3g} times"


def _held_out(amounts: Amounts) -> str:
    if not amounts.num_validation_rows:
        return "none held out: no validation loss"
    return f"{formats.count(amounts.num_validation_rows)} to validate on"


def _tokens(amounts: Amounts) -> Line:
    about = "" if amounts.is_exact else "about "
    note = f"{about}{_short(amounts.epoch_tokens, amounts)} an epoch"
    return Line(label="Tokens", value=f"{about}{_short(amounts.total_tokens, amounts)}", note=note)


def _short(value: int, amounts: Amounts) -> str:
    """Return a count; an estimate has two or three digits that mean something."""
    if amounts.is_exact or value < 1000:
        return formats.count(value)
    digits = len(str(value)) - 3
    return formats.count(round(value, -digits))


def _truncated(amounts: Amounts, max_length: int) -> Line:
    share = amounts.share_truncated
    if share == 0:
        return Line(
            label="Cut rows",
            value="none",
            note=f"the longest has {formats.count(amounts.longest_row)} tokens",
        )
    text = f"{share:.1%}" if share >= 0.001 else "under 0.1%"
    note = f"end at {formats.count(max_length)} tokens; what follows is not trained on"
    return Line(
        label="Cut rows", value=text.replace("%", " %"), note=note, tone="warn" if share > 0.02 else ""
    )


def _time(estimate: Estimate) -> Line:
    times = estimate.time_range_s
    if times is None or estimate.pace is None:
        return Line(
            label="Time",
            value="unknown until the first run",
            note="then from the steps that this server did",
            tone="idle",
        )
    note = f"as {estimate.pace.num_steps} earlier steps of this size here, the fastest and slowest tenth left out"
    return Line(label="Time", value=recipe_facts.time_range(*times), note=note)


def _memory(memory: Memory) -> Line:
    if memory.fit is Fit.UNKNOWN:
        return Line(
            label="Memory", value="not known", note="a worker tells once it has loaded the model", tone="idle"
        )
    amount = f"about {_gigabytes(memory.needed_bytes)} of {_gigabytes(memory.total_bytes)}"
    note = f"{amount}; {memory.remedy}" if memory.remedy else amount
    return Line(label="Memory", value=str(memory.fit), note=note, tone=_TONES[memory.fit])


def _gigabytes(num_bytes: int) -> str:
    return f"{max(num_bytes / 1e9, 0.1):.1f} GB"


def _disk(disk: Disk) -> Line:
    each = f"{disk.num_kept} checkpoints of {formats.filesize(disk.checkpoint_bytes)}"
    if not disk.checkpoint_bytes:
        return Line(
            label="Disk", value="not known", note="a worker tells once it has loaded the model", tone="idle"
        )
    if disk.free_bytes is None:
        return Line(label="Disk", value=formats.filesize(disk.total_bytes), note=each)
    is_short = disk.total_bytes > disk.free_bytes
    note = f"{each}; {formats.filesize(disk.free_bytes)} free"
    if is_short:
        note += ": keep fewer checkpoints or delete some"
    value = f"{formats.filesize(disk.total_bytes)}"
    return Line(label="Disk", value=value, note=note, tone="bad" if is_short else "")


def _start(turn: Turn) -> Line:
    if not turn.has_worker:
        note = "no worker takes runs now; the run starts when one does"
        return Line(label="Starts", value="waits for a worker", note=note, tone="warn")
    if not turn.position:
        return Line(label="Starts", value="at once")
    when = (
        "nobody can tell when yet"
        if turn.starts_in_s is None
        else f"in {recipe_facts.about(turn.starts_in_s)}"
    )
    return Line(label="Starts", value=f"as number {turn.position} in the queue", note=when, tone="busy")
