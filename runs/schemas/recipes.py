"""What a person asks of a recipe: the settings of the form, the YAML file and the REST body alike.

A value of None means "the rule decides"; `runs.recipes.defaults` holds the rules.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from runs.schemas.names import ModelName

MAX_STEPS: Final = 1_000_000
MAX_PROMPTS: Final = 8
# A dataset of fewer rows is not split: too few would be left to train on, or to measure.
MIN_ROWS_TO_SPLIT: Final = 20
MAX_PROMPT_CHARS: Final = 8_000


def _without_nul(value: str) -> str:
    if "\0" in value:  # the database cannot hold it
        raise ValueError("must not hold NUL")
    return value


Share = Annotated[float, Field(ge=0, le=1)]
Prompt = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS, strip_whitespace=True),
    AfterValidator(_without_nul),
]
DatasetRef = Annotated[str, StringConstraints(pattern=r"^ds-[0-9a-f]{12}(@[1-9][0-9]{0,5})?$")]
ScheduleName = Literal["constant", "linear", "cosine"]
Every = Annotated[int, Field(ge=1, le=MAX_STEPS)]


class RecipeModel(BaseModel):
    """An object of a recipe's settings: unknown names are errors, so that a typing error is seen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraSettings(RecipeModel):
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False

    @model_validator(mode="after")
    def _trains_something(self) -> LoraSettings:
        if not (self.train_attn or self.train_mlp or self.train_unembed):
            raise ValueError("at least one of train_attn, train_mlp, train_unembed must be true")
        return self


class Validation(RecipeModel):
    """What the validation loss is measured on: a share of the rows, or other datasets, or both."""

    share: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    max_rows: Annotated[int, Field(ge=1, le=2_000)] = 200
    datasets: Annotated[list[DatasetRef], Field(max_length=4)] = []


class SampleSettings(RecipeModel):
    """Prompts that are answered every so often; `every` None means when the validation loss is measured."""

    prompts: Annotated[list[Prompt], Field(max_length=MAX_PROMPTS)] = []
    every: Every | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0


class SftConfig(RecipeModel):
    """Supervised fine-tuning: next-token loss on the chosen turns of a dataset's rows."""

    recipe: Literal["sft"] = "sft"
    base_model: ModelName
    dataset: DatasetRef
    lora: LoraSettings = LoraSettings()

    num_epochs: Annotated[float, Field(gt=0, le=1_000)] | None = None
    num_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=4_096)] = 8
    batch_tokens: Annotated[int, Field(ge=16, le=1_000_000)] | None = None
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    train_on: Literal["assistant", "last", "all"] = "assistant"

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: ScheduleName = "cosine"
    warmup_share: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    grad_clip_norm: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42

    validation: Validation = Validation()
    eval_every: Every | None = None
    early_stopping: Annotated[int, Field(ge=1, le=1_000)] | None = None
    save_every: Every | None = None
    keep_checkpoints: Annotated[int, Field(ge=1, le=1_000)] = 3
    samples: SampleSettings = SampleSettings()

    @model_validator(mode="after")
    def _one_length(self) -> SftConfig:
        if self.num_epochs is not None and self.num_steps is not None:
            raise ValueError("give num_epochs or num_steps, not both")
        return self


class Changes(RecipeModel):
    """Settings to change while a run trains; the others would make it another run. What is left out stays, in `samples` too."""

    num_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: ScheduleName | None = None
    warmup_share: Share | None = None
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    grad_clip_norm: Annotated[float, Field(ge=0, le=1e6)] | None = None
    eval_every: Every | None = None
    save_every: Every | None = None
    keep_checkpoints: Annotated[int, Field(ge=1, le=1_000)] | None = None
    early_stopping: Annotated[int, Field(ge=1, le=1_000)] | None = None
    samples: SampleSettings | None = None

    def given(self) -> dict[str, Any]:
        """Return the settings that were given, ready for a config."""
        return self.model_dump(mode="json", exclude_unset=True)
