"""What an open page says to talk to weights: the messages of its socket."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from runs.schemas.data import WireModel
from runs.schemas.names import Id, Int64, ModelName, PathText

MAX_TARGETS = 4
MAX_MESSAGES = 200
MAX_TOKENS = 4096
MAX_CHARS = 100_000

Text = Annotated[str, StringConstraints(max_length=MAX_CHARS)]


class Message(WireModel):
    role: Literal["system", "user", "assistant"]
    content: Text


class Target(WireModel):
    """Weights that answer: a bare base model, a checkpoint, or the newest checkpoint of a run."""

    base_model: ModelName | None = None
    checkpoint: PathText | None = None
    run: Id | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Target:
        if [self.base_model, self.checkpoint, self.run].count(None) != 2:
            raise ValueError("give one of base_model, checkpoint, run")
        return self


class Ask(WireModel):
    """A conversation to go on with, or a `prompt` to continue as it stands, by each of the targets."""

    ask: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_CHARS)] | None = None
    targets: Annotated[list[Target], Field(min_length=1, max_length=MAX_TARGETS)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 256
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.7
    seed: Int64 | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Ask:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give messages or prompt")
        return self
