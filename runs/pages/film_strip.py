"""The film strip: how a run's answers to its fixed prompts change, a prompt a row, a step a column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from django.db.models import Count, Max, Q
from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import render
from django.views.decorators.http import require_GET

from runs.models import FixedSample, Operation, TrainingRun, User
from runs.pages.policies import signed_in
from runs.pages.word_changes import Change, changes
from runs.recipes.rendering import decoder_of
from runs.schemas.results import decode_sample
from runs.services import access, recipe_status

NUM_COLUMNS: Final = 24
MAX_COLUMNS: Final = 120
MAX_PROMPTS: Final = 16
_MAX_ERROR_CHARS: Final = 200


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One answer: what changed since the one before it, or why there is none."""

    key: str
    state: str
    parts: tuple[Change, ...]
    note: str
    is_same: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt and its answers, one for each column."""

    number: int
    prompt: str
    is_current: bool
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The columns that are shown, the base model's (None) first; `version` changes when an answer comes.

    `num_wanted` is what to ask for to see older columns, nothing when all or the most are shown.
    """

    run_id: str
    columns: list[int | None]
    rows: list[Row]
    num_older: int
    num_shown: int
    num_wanted: int | None
    settings: str


@signed_in
@require_GET
def film_strip(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Return the strip alone, for the page that is open."""
    user: User = request.user  # type: ignore[assignment]
    recipe = access.get_recipe(user, run_id)
    strip = strip_of(recipe.run, recipe.config, num_columns=num_columns_of(request))
    return render(request, "runs/_film_strip.html", {"strip": strip})


def num_columns_of(request: HttpRequest) -> int:
    """Return how many columns of steps the page asks for."""
    text = request.GET.get("columns", "")
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 5 else NUM_COLUMNS
    return min(max(number, 1), MAX_COLUMNS)


def version_of(run: TrainingRun) -> str:
    """Return a word that changes whenever the strip does."""
    counted = FixedSample.objects.filter(run=run).aggregate(
        rows=Count("pk"),
        newest=Max("operation_id"),
        done=Count("pk", filter=~Q(operation__state=Operation.State.QUEUED) & Q(operation__isnull=False)),
        failed=Count("pk", filter=~Q(error="")),
    )
    return "-".join(str(counted[name] or 0) for name in ("rows", "newest", "done", "failed"))


def strip_of(run: TrainingRun, config: dict[str, object], *, num_columns: int) -> Strip:
    """Return the newest columns of the run's strip."""
    samples = recipe_status.fixed_samples_of(run).defer("operation__payload")
    steps = samples.filter(step__isnull=False).order_by("-step").values_list("step", flat=True).distinct()
    # One column more than is shown: the first shown is compared with it.
    newest = [step for step in steps[: num_columns + 1] if step is not None]
    num_steps = steps.count() if len(newest) > num_columns else len(newest)
    shown = newest[:num_columns][::-1]
    found = list(samples.filter(Q(step__isnull=True) | Q(step__in=newest)))
    read = _reader_of(run.base_model)
    settings = config["samples"]
    assert isinstance(settings, dict)
    prompts = list(dict.fromkeys([*settings["prompts"], *(sample.prompt for sample in found)]))[:MAX_PROMPTS]
    num_older = num_steps - len(shown)
    return Strip(
        run_id=run.public_id,
        columns=[None, *shown],
        rows=[
            _row(number, prompt, prompt in settings["prompts"], found, newest[::-1], shown, read)
            for number, prompt in enumerate(prompts, start=1)
        ],
        num_older=num_older,
        num_shown=len(shown),
        num_wanted=min(num_columns + NUM_COLUMNS, MAX_COLUMNS)
        if num_older > 0 and num_columns < MAX_COLUMNS
        else None,
        settings=f"temperature {settings['temperature']:g}, seed {settings['seed']}, "
        f"at most {settings['max_tokens']} tokens",
    )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A sample as it is: its text once it is done."""

    state: str
    text: str
    note: str


Reader = Callable[[FixedSample], _Answer]


def _row(
    number: int,
    prompt: str,
    is_current: bool,
    found: Iterable[FixedSample],
    compared: Sequence[int],
    shown: Sequence[int],
    read: Reader,
) -> Row:
    answers = {sample.step: read(sample) for sample in found if sample.prompt == prompt}
    cells, before = [], None
    for step in (None, *compared):
        answer = answers.get(step)
        if step is None or step in shown:
            cells.append(_cell(f"{number}-{'base' if step is None else step}", answer, before))
        if answer is not None and answer.state == "done":
            before = answer.text
    return Row(number=number, prompt=prompt, is_current=is_current, cells=cells)


def _cell(key: str, answer: _Answer | None, before: str | None) -> Cell:
    if answer is None:
        note = "asked when the run starts" if key.endswith("-base") else "not asked"
        return Cell(key=key, state="absent", parts=(), note=note, is_same=False)
    if answer.state != "done":
        return Cell(key=key, state=answer.state, parts=(), note=answer.note, is_same=False)
    is_first = before is None
    return Cell(
        key=key,
        state="done",
        parts=(Change(answer.text, "same"),) if is_first else changes(before or "", answer.text),
        note=answer.note,
        is_same=before == answer.text,
    )


def _reader_of(base_model: str) -> Reader:
    decode = decoder_of(base_model)

    def read(sample: FixedSample) -> _Answer:
        operation = sample.operation
        error = sample.error or (operation.error if operation is not None else "")
        if error:
            return _Answer(state="failed", text="", note=error[:_MAX_ERROR_CHARS])
        if operation is None:
            return _Answer(state="pending", text="", note="waiting for its weights to be saved")
        if operation.state != Operation.State.DONE or operation.result is None:
            return _Answer(state="pending", text="", note="waiting for its answer")
        sequence = decode_sample(bytes(operation.result)).sequences[0]
        tokens = sequence.tokens.tolist()
        ended = "cut at the limit" if sequence.stop_reason == "length" else "ended by itself"
        noun = "token" if len(tokens) == 1 else "tokens"
        return _Answer(state="done", text=decode(tokens), note=f"{len(tokens)} {noun}, {ended}")

    return read
