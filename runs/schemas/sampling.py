"""Sampling requests, and the check of a prompt against its base model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from runs.exceptions import RequestInvalid
from runs.schemas.data import ModelInput, WireModel, check_vocabulary
from runs.schemas.names import Id, Int64, ModelName, PathText, SeqId
from runs.schemas.problems import show
from runs.schemas.requests import SdkRequest, Unsupported
from runs.schemas.tensors import MAX_TOKEN

MAX_STOPS = 64
MAX_STOP_CHARS = 1000
MAX_TOPK_PROMPT_LOGPROBS = 100


class CreateSamplingSession(SdkRequest):
    """Samples from a checkpoint (`model_path`) or from a bare base model."""

    session_id: Id
    sampling_session_seq_id: SeqId
    base_model: ModelName | None = None
    model_path: PathText | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> CreateSamplingSession:
        if self.base_model is None and self.model_path is None:
            raise ValueError("give base_model or model_path")
        return self


class SamplingParams(WireModel):
    """How to draw tokens. No `stop` means the model's end tokens, an empty list means never."""

    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    seed: Int64 | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN)] = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    @field_validator("stop", mode="wrap")
    @classmethod
    def _check_stop(cls, value: Any, _handler: object) -> Any:
        if value is None:
            return value
        stops = value if isinstance(value, list) else [value]
        if len(stops) > MAX_STOPS:
            raise ValueError(f"has {len(stops)} stops, at most {MAX_STOPS} are allowed")
        if {type(stop) for stop in stops} not in (set(), {str}, {int}):
            raise ValueError(f"must be a string, a list of strings or a list of token ids, got {show(value)}")
        for index, stop in enumerate(stops):
            _check_one_stop(stop, index)
        return value

    @field_validator("top_k")
    @classmethod
    def _top_k_is_off_or_positive(cls, top_k: int) -> int:
        if top_k == 0:
            raise ValueError("must be -1 (off) or at least 1, got 0")
        return top_k

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(stop for stop in self._stops() if isinstance(stop, str))

    @property
    def stop_tokens(self) -> tuple[int, ...] | None:
        """Token ids to stop at; None means the model's own end tokens."""
        if self.stop is None or self.stop_strings:
            return None
        return tuple(stop for stop in self._stops() if isinstance(stop, int))

    def _stops(self) -> list[str] | list[int]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


def _check_one_stop(stop: str | int, index: int) -> None:
    if isinstance(stop, str):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ValueError(f"stop {index} has {len(stop)} characters, 1 to {MAX_STOP_CHARS} are allowed")
    elif not 0 <= stop <= MAX_TOKEN:
        raise ValueError(f"stop {index} must be a token id of at least 0, got {stop}")


class Sample(SdkRequest):
    """asample. With `prompt_logprobs_last_n`, earlier prompt logprobs are to be left out (NaN)."""

    sampling_session_id: Id
    seq_id: SeqId
    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt: ModelInput
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOPK_PROMPT_LOGPROBS)] = 0

    prompt_alt_tokens_k: Unsupported = None
    record_stability_info: Unsupported = None
    topk_sample_logprobs: Unsupported = None
    target_prompt_logprobs: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: field for key, field in value.items() if field is not None}

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt: ModelInput) -> ModelInput:
        if not any(chunk.tokens for chunk in prompt.chunks):
            raise ValueError("must hold at least one token")
        return prompt

    @model_validator(mode="after")
    def _last_n_within_prompt(self) -> Sample:
        last_n = self.prompt_logprobs_last_n
        most = sum(len(chunk.tokens) for chunk in self.prompt.chunks) - 1
        if last_n is not None and not (self.prompt_logprobs and last_n <= most):
            raise ValueError(f"prompt_logprobs_last_n needs prompt_logprobs and at most {most}, got {last_n}")
        return self


class StoredSample(Sample):
    """A sample request in the log. `stream` asks the worker to show tokens while it draws them.

    Only our own pages set it: SDK requests are read as `Sample`, which leaves the key unread.
    """

    stream: bool = False


def check_prompt(sample: Sample, *, vocab_size: int, max_context: int) -> None:
    """Check what only the base model knows. Prompt plus `max_tokens` may pass the context: it ends a sample.

    Raises:
        RequestInvalid: a token is outside the vocabulary, or the prompt alone is too long.
    """
    tokens = sample.prompt.array(place="prompt")
    if tokens.size > max_context:
        raise RequestInvalid(
            f"has {tokens.size} tokens, but the context length of the base model is {max_context}",
            place="prompt",
        )
    check_vocabulary(tokens, vocab_size, place="prompt")
