"""The JSON bodies of every SDK request but forward_backward, of both SDK versions, and their stored form.

What the server does not support is refused here by its name, so that it fails at once and in words.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from runs.schemas.data import WireModel
from runs.schemas.names import (
    CheckpointName,
    DisplayName,
    Id,
    Int64,
    ModelName,
    PathText,
    SeqId,
)
from runs.schemas.problems import show

MAX_METADATA_KEYS = 64
MAX_METADATA_BYTES = 16 << 10
MAX_TTL_S = 10 * 366 * 24 * 3600
_ADAM_NAMES = ("adam", "adamw")


def _metadata(value: object) -> object:
    """Turn values that are no strings into JSON text: clients read only strings back."""
    if not isinstance(value, dict):
        return value
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in value.items()}
    num_bytes = len(json.dumps(texts))
    if num_bytes > MAX_METADATA_BYTES:
        raise ValueError(f"has {num_bytes} bytes, at most {MAX_METADATA_BYTES} are kept")
    return texts


def _adam_only(value: object) -> object:
    name = value.get("type", "adamw") if isinstance(value, dict) else "adamw"
    if name not in _ADAM_NAMES:
        raise ValueError(f"the optimizer {show(name)} is not supported; use one of {', '.join(_ADAM_NAMES)}")
    return value


def _refuse_if_wanted(value: object) -> None:
    if value:
        raise ValueError(f"is not supported by this server, leave it out; got {show(value)}")


# Not ignored: the client would take the answer for what it asked.
Unsupported = Annotated[Any, AfterValidator(_refuse_if_wanted), Field(exclude=True)]
Metadata = Annotated[dict[str, str], BeforeValidator(_metadata), Field(max_length=MAX_METADATA_KEYS)]
Ttl = Annotated[int, Field(ge=1, le=MAX_TTL_S)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
Secret = Annotated[str | None, Field(exclude=True, max_length=4096)]


class SdkRequest(WireModel):
    """A request body. `volatile` names fields that may differ between two sends of one request."""

    volatile: ClassVar[frozenset[str]] = frozenset()


# -- sessions ---------------------------------------------------------------------------------------


class CreateSession(SdkRequest):
    tags: Annotated[list[DisplayName], Field(max_length=100)] = []
    user_metadata: Metadata | None = None
    sdk_version: Annotated[str, StringConstraints(max_length=100)] = ""
    project_id: Id | None = None
    display_name: DisplayName | None = None


class SessionHeartbeat(SdkRequest):
    session_id: Id


class FinishReason(WireModel):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(SdkRequest):
    reason: FinishReason
    detail: Text | None = None


# -- training ---------------------------------------------------------------------------------------


class LoraConfig(WireModel):
    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    seed: Int64 | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @model_validator(mode="after")
    def _trains_something(self) -> LoraConfig:
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise ValueError("at least one of train_unembed, train_mlp, train_attn must be true")
        return self


class OptimizerConfig(WireModel):
    type: Annotated[str, StringConstraints(max_length=100)] = "adamw"


AdamConfig = Annotated[OptimizerConfig, BeforeValidator(_adam_only)]


class CreateModel(SdkRequest):
    session_id: Id
    model_seq_id: SeqId
    base_model: ModelName
    user_metadata: Metadata | None = None
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: AdamConfig | None = None


class GetInfo(SdkRequest):
    model_id: Id


class UnloadModel(SdkRequest):
    model_id: Id


class AdamParams(WireModel):
    """AdamW hyperparameters; `grad_clip_norm` <= 0 turns clipping off."""

    learning_rate: Annotated[float, Field(ge=0, le=1e3)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-12
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(SdkRequest):
    """`optimizer_params` is the newer key for the same thing; after reading it is `adam_params`."""

    model_id: Id
    seq_id: SeqId
    adam_params: Annotated[AdamParams, BeforeValidator(_adam_only)]

    @model_validator(mode="before")
    @classmethod
    def _one_key(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("optimizer_params") is None:
            return value
        if value.get("adam_params") is not None:
            raise ValueError("send adam_params or optimizer_params, not both")
        return {**value, "adam_params": value["optimizer_params"]}


# -- checkpoints ------------------------------------------------------------------------------------


class SaveWeights(SdkRequest):
    model_id: Id
    path: CheckpointName
    seq_id: SeqId
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveWeightsForSampler(SdkRequest):
    """Named when `path` is given; otherwise ephemeral, for a new sampling session."""

    volatile: ClassVar[frozenset[str]] = frozenset({"sampling_session_seq_id"})

    model_id: Id
    seq_id: SeqId
    path: CheckpointName | None = None
    sampling_session_seq_id: SeqId | None = None
    ttl_seconds: Ttl | None = None
    kind: Annotated[str, StringConstraints(max_length=100)] | None = None
    user_metadata: Metadata | None = None

    @field_validator("kind")
    @classmethod
    def _snapshot_only(cls, kind: str | None) -> str | None:
        if kind not in (None, "snapshot"):
            raise ValueError(f"the kind {show(kind)} is not supported; use 'snapshot'")
        return kind

    @model_validator(mode="after")
    def _one_target(self) -> SaveWeightsForSampler:
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise ValueError("give either path or sampling_session_seq_id")
        return self


class LoadWeights(SdkRequest):
    """Into an existing model (`model_id`, `seq_id`), or into a new one (`session_id`, `model_seq_id`)."""

    path: PathText
    optimizer: bool = False
    model_id: Id | None = None
    seq_id: SeqId | None = None
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    base_model: ModelName | None = None
    user_metadata: Metadata | None = None
    optimizer_config: AdamConfig | None = None
    weights_access_token: Secret = None

    @property
    def creates_model(self) -> bool:
        return self.session_id is not None

    @model_validator(mode="after")
    def _one_form(self) -> LoadWeights:
        existing = (self.model_id is not None, self.seq_id is not None)
        new = (self.session_id is not None, self.model_seq_id is not None)
        if (existing, new) not in (((True, True), (False, False)), ((False, False), (True, True))):
            raise ValueError("give either model_id and seq_id, or session_id and model_seq_id")
        return self


class WeightsInfo(SdkRequest):
    tinker_path: PathText


class SetTtl(SdkRequest):
    """null removes the time limit."""

    ttl_seconds: Ttl | None


# -- futures ----------------------------------------------------------------------------------------


class RetrieveFuture(SdkRequest):
    request_id: Id
    allow_metadata_only: bool = False


# -- stored form ------------------------------------------------------------------------------------

RequestT = TypeVar("RequestT", bound=SdkRequest)


def canonical_json(request: SdkRequest) -> bytes:
    """Return the request as it is stored: compact, keys sorted, without nulls and secrets."""
    return _dump(request, frozenset())


def request_digest(request: SdkRequest) -> str:
    """Return the SHA-256, in hex, that is equal for every send of one request."""
    return hashlib.sha256(_dump(request, request.volatile)).hexdigest()


def from_canonical(model_class: type[RequestT], stored: bytes) -> RequestT:
    """Return the request that `canonical_json` wrote."""
    return model_class.model_validate_json(stored)


def _dump(request: SdkRequest, exclude: frozenset[str]) -> bytes:
    plain = request.model_dump(mode="json", exclude_none=True, exclude=set(exclude))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
