"""The form of a new run and the settings behind it: what each field is, and the way between both.

A form's values are texts by place ("lora.rank"), a list for each as browsers send them. An empty text
leaves a setting to its default or its rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runs.recipes import defaults
from runs.schemas.recipes import SftConfig

Values = Mapping[str, Sequence[str]]
LENGTH: Final = "length"
NAME: Final = "name"
MAX_VALIDATION_DATASETS: Final = 4
_LISTS: Final = ("samples.prompts", "validation.datasets")
_LENGTHS: Final = {"epochs": "num_epochs", "steps": "num_steps"}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field: its place in the settings, what it is called and why one would change it.

    Args:
        kind: number, choice or switch.
        unit: what a number counts, beside the field.
        rule: in words, what decides it while it is empty.
    """

    place: str
    label: str
    why: str
    kind: str = "number"
    options: tuple[tuple[str, str], ...] = ()
    unit: str = ""
    rule: str = ""

    @property
    def default(self) -> str:
        """Return the default as the form has it; empty where a rule decides."""
        return DEFAULTS[self.place][0] if DEFAULTS[self.place] else ""

    @property
    def html_id(self) -> str:
        return "f-" + self.place.replace(".", "-")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Fields that belong together."""

    title: str
    fields: tuple[Field, ...]


def _blank() -> dict[str, Any]:
    config = SftConfig(base_model="-", dataset="ds-000000000000").model_dump(mode="json")
    return {**config, "base_model": None, "dataset": None, "num_epochs": defaults.NUM_EPOCHS}


def flat(config: Mapping[str, Any], *, name: str = "") -> dict[str, list[str]]:
    """Return settings as a form's values; a place that is not given has no value."""
    values = {place: _texts(value) for place, value in _leaves(config)}
    if values.get("num_steps"):
        values[LENGTH] = ["steps"]
        values["num_epochs"] = []
    else:
        values[LENGTH] = ["epochs"]
    return {**values, NAME: [name] if name else []}


def nested(values: Values) -> dict[str, Any]:
    """Return the settings that a form's values give, not yet checked; empty fields are left out."""
    settings: dict[str, Any] = {}
    unused = {place for length, place in _LENGTHS.items() if length != _last(values, LENGTH, "epochs")}
    for place in DEFAULTS:
        texts = [text.replace("\r\n", "\n").strip() for text in values.get(place, ())]
        if place in (NAME, LENGTH) or place in unused:
            continue
        outer, _, inner = place.partition(".")
        group = settings.setdefault(outer, {}) if inner else settings
        if place in _LISTS:
            group[inner] = [text for text in texts if text]
        elif texts and texts[-1]:
            group[inner or outer] = texts[-1]
    return settings


def name_of(values: Values) -> str:
    """Return the run's name with nothing in it that cannot be shown."""
    return "".join(letter for letter in _last(values, NAME, "") if letter.isprintable()).strip()[:200]


def _last(values: Values, place: str, default: str) -> str:
    texts = values.get(place) or [default]
    return texts[-1] or default


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, float) and value.is_integer():
        return [str(int(value))]
    return [str(value)]


DEFAULTS: Final = flat(_blank())
_TRAIN_ON: Final = (
    ("assistant", "every answer"),
    ("last", "the last answer"),
    ("all", "the whole text"),
)
_SCHEDULES: Final = (("constant", "constant"), ("linear", "linear"), ("cosine", "cosine"))

BATCH_SIZE: Final = Field(
    place="batch_size",
    label="Batch size",
    unit="rows a step",
    why="More rows make a calmer gradient and fewer steps.",
)
LEARNING_RATE: Final = Field(
    place="learning_rate",
    label="Learning rate",
    rule="from the base model's size",
    why="The peak rate. Halve it if the loss jumps about, double it if the loss hardly falls.",
)
RANK: Final = Field(
    place="lora.rank",
    label="LoRA rank",
    why="How much the adapter can learn; 8 to 32 is enough for style and format.",
)
MAX_LENGTH: Final = Field(
    place="max_length",
    label="Max length",
    unit="tokens a row",
    rule="what the base model takes, at most 4096",
    why="Longer rows are cut here. Memory grows with it.",
)
MAIN: Final = (BATCH_SIZE, LEARNING_RATE, RANK, MAX_LENGTH)

MORE: Final = (
    Group(
        title="Adapter",
        fields=(
            Field(
                place="lora.train_attn",
                label="Train attention",
                kind="switch",
                why="The query, key, value and output projections.",
            ),
            Field(
                place="lora.train_mlp",
                label="Train MLP",
                kind="switch",
                why="The largest part of a model and the one that learns most.",
            ),
            Field(
                place="lora.train_unembed",
                label="Train unembedding",
                kind="switch",
                why="The output layer; for new symbols or another language.",
            ),
        ),
    ),
    Group(
        title="Data",
        fields=(
            Field(
                place="train_on",
                label="Train on",
                kind="choice",
                options=_TRAIN_ON,
                why="Which part of a row carries loss; the rest is only read.",
            ),
            Field(
                place="batch_tokens",
                label="Batch by tokens",
                unit="tokens a step",
                rule="off: batches count rows",
                why="Fills each batch up to this many tokens instead of rows, for rows of very unlike length.",
            ),
            Field(
                place="seed",
                label="Seed",
                why="Another seed gives another order of rows and other first weights.",
            ),
        ),
    ),
    Group(
        title="Learning rate",
        fields=(
            Field(
                place="schedule",
                label="Schedule",
                kind="choice",
                options=_SCHEDULES,
                why="How the rate falls towards the end; a falling one ends at a lower loss.",
            ),
            Field(
                place="warmup_share",
                label="Warm-up",
                unit="share of the steps",
                why="The rate rises to its peak over this part, so that the first steps do no harm.",
            ),
            Field(
                place="weight_decay",
                label="Weight decay",
                why="Pulls the adapter towards zero; seldom needed with LoRA.",
            ),
            Field(
                place="grad_clip_norm",
                label="Gradient clipping",
                unit="norm",
                why="Steps with a larger gradient are cut to this; 0 never cuts.",
            ),
        ),
    ),
    Group(
        title="Validation",
        fields=(
            Field(
                place="validation.share",
                label="Held-out share",
                unit="of the rows",
                why="Rows that are never trained on; their loss shows when the run starts to learn by heart.",
            ),
            Field(
                place="validation.max_rows",
                label="At most",
                unit="rows",
                why="More give a steadier validation loss and take more time.",
            ),
            Field(
                place="eval_every",
                label="Validate every",
                unit="steps",
                rule="ten times a run",
                why="How often the validation loss is measured.",
            ),
            Field(
                place="early_stopping",
                label="Stop early after",
                unit="validations",
                rule="off: the run goes to its end",
                why="Ends the run when the validation loss has not improved for so many in a row.",
            ),
        ),
    ),
    Group(
        title="Checkpoints",
        fields=(
            Field(
                place="save_every",
                label="Save every",
                unit="steps",
                rule="with each validation",
                why="A checkpoint can be sampled from, downloaded, or trained on from.",
            ),
            Field(
                place="keep_checkpoints",
                label="Keep",
                unit="checkpoints",
                why="The best and the newest; older ones are deleted. The last of the run is always kept.",
            ),
        ),
    ),
    Group(
        title="Samples",
        fields=(
            Field(
                place="samples.every",
                label="Answer every",
                unit="steps",
                rule="with each validation",
                why="How often the sample prompts are answered.",
            ),
            Field(
                place="samples.max_tokens",
                label="At most",
                unit="tokens an answer",
                why="Longer answers are cut here.",
            ),
            Field(
                place="samples.temperature",
                label="Temperature",
                why="0 always takes the likeliest token, so that answers can be compared.",
            ),
            Field(
                place="samples.seed",
                label="Seed",
                why="Makes sampled answers repeatable; no effect at temperature 0.",
            ),
        ),
    ),
)
