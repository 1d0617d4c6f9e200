"""Samples: ask weights for text, wait for the answer."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from django.db import transaction
from django.http import HttpRequest
from ninja import Query, Router, Status
from pydantic import BaseModel, Field, model_validator

from runs import ids
from runs.exceptions import NotFound, RequestInvalid, ResultExpired
from runs.models import Operation
from runs.recipes.rendering import decoder_of, renderer_of
from runs.rest.bodies import JsonBody
from runs.rest.boundary import caller
from runs.rest.runs import RequestModel
from runs.schemas import requests, results
from runs.schemas import sampling as schemas
from runs.schemas.names import Id, Int64, ModelName, PathText
from runs.schemas.playground import MAX_MESSAGES, MAX_TOKENS, Message, Target, Text
from runs.schemas.waits import MAX_WAIT_S, WaitS
from runs.services import access, base_models, operations, playground, sampling, sessions, waiting
from runs.services.operations import Submission

router = Router(tags=["samples"])

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Ask(RequestModel):
    """A prompt or a conversation, and who is to answer it."""

    prompt: Text | None = Field(
        default=None, description="What the user says, or with `raw` the text to go on."
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    raw: bool = Field(
        default=False, description="Continue the prompt as it stands, without the chat template."
    )
    checkpoint: PathText | None = Field(default=None, description="A tinker:// path.")
    run: Id | None = Field(default=None, description="A run, for its newest checkpoint.")
    base_model: ModelName | None = Field(default=None, description="A bare base model.")
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 256
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    seed: Int64 | None = None
    stop: Annotated[list[Stop], Field(max_length=16)] | None = Field(
        default=None, description="Texts to stop at; the model's own end when left out."
    )
    num_samples: Annotated[int, Field(ge=1, le=64)] = 1

    @model_validator(mode="after")
    def _is_clear(self) -> Ask:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give prompt or messages")
        if self.raw and self.prompt is None:
            raise ValueError("raw needs a prompt")
        if [self.checkpoint, self.run, self.base_model].count(None) != 2:
            raise ValueError("give one of checkpoint, run, base_model")
        return self


class Sequence(BaseModel):
    """One answer."""

    text: str
    tokens: list[int]
    stop_reason: Literal["stop", "length"]


class SampleOut(BaseModel):
    """A request for samples and, once it is done, the answers."""

    id: str
    state: Literal["queued", "done", "failed"]
    base_model: str
    checkpoint: str | None
    sequences: list[Sequence]
    error: str
    reason: str = Field(description="Why there is no answer yet, when it is not just its turn.")
    created_at: datetime
    finished_at: datetime | None


@router.post("", response={202: SampleOut}, summary="Ask for a sample")
def ask_sample(request: HttpRequest, body: Annotated[Ask, JsonBody(...)]) -> Status[SampleOut]:
    """Ask weights to answer; the reply has the id to wait with."""
    user = caller(request)
    target = Target(base_model=body.base_model, checkpoint=body.checkpoint, run=body.run)
    weights = playground.weights_of(user, target)
    prompt = _prompt(body, weights.base_model)
    if not prompt:
        raise RequestInvalid("has no tokens", place="prompt")
    with transaction.atomic():  # a refusal leaves no session behind
        session = sessions.create_session(user, tags=["rest"], display_name="REST")
        held = playground.open_sampling(session, weights, seq_id=0)
        sample = schemas.Sample.model_validate(
            {
                "sampling_session_id": held.public_id,
                "seq_id": 0,
                "num_samples": body.num_samples,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
                "sampling_params": _params(body, weights.base_model),
            }
        )
        info = base_models.get(weights.base_model)
        if info.is_loaded:
            schemas.check_prompt(sample, vocab_size=info.vocab_size, max_context=info.max_context)
        payload = requests.canonical_json(sample)
        pk = operations.submit_sample(held, Submission(kind=Operation.Kind.SAMPLE, seq=0, payload=payload))
        sessions.finish(session, "asked")  # nothing more comes in it
    return Status(202, _read(request, f"op-{pk}"))


@router.get("/{sample_id}", response=SampleOut, summary="Wait for a sample")
def get_sample(
    request: HttpRequest,
    sample_id: str,
    wait_s: WaitS = 0.0,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_S, deprecated=True, description="The former name of `wait_s`.")
    ] = 0.0,
) -> SampleOut:
    """Return the answer, or `queued` when there is none within `wait_s`.

    The answer of a run or checkpoint of yours is kept until the run is deleted, any other for a day.
    """
    if wait and wait_s:
        raise RequestInvalid("is the former name of wait_s; give one of them", place="wait")
    return _read(request, sample_id)


def _prompt(body: Ask, base_model: str) -> list[int]:
    renderer = renderer_of(base_model)
    if body.messages is not None:
        return renderer.prompt([{"role": one.role, "content": one.content} for one in body.messages])
    return renderer.prompt(body.prompt or "", as_chat=not body.raw)


def _params(body: Ask, base_model: str) -> dict[str, Any]:
    stop: Any = body.stop
    if stop is None and not body.raw:
        stop = list(renderer_of(base_model).stop_tokens) or None
    return {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": -1 if body.top_k is None else body.top_k,
        "seed": body.seed,
        "stop": stop,
    }


def _operation(request: HttpRequest, sample_id: str) -> Operation:
    found = access.get_operation(caller(request), ids.parse_request_id(sample_id))
    if found.sampling_session is None:
        raise NotFound(f"{sample_id} is no sample")
    return found


def _read(request: HttpRequest, sample_id: str) -> SampleOut:
    row = _operation(request, sample_id)
    held = row.sampling_session
    assert held is not None
    if row.state == Operation.State.DONE and row.result is None:
        raise ResultExpired
    sequences: list[Sequence] = []
    if row.state == Operation.State.DONE and row.result and row.result_is_proto:
        decode = decoder_of(held.base_model)
        sequences = [
            Sequence(
                text=decode(one.tokens.tolist()), tokens=one.tokens.tolist(), stop_reason=one.stop_reason
            )
            for one in results.decode_sample(bytes(row.result)).sequences
        ]
    return SampleOut(
        id=row.request_id,
        state=row.state,
        base_model=held.base_model,
        checkpoint=(sampling.path_of(held.checkpoint) if held.checkpoint else held.model_path) or None,
        sequences=sequences,
        error=row.error,
        reason=waiting.reason_of(row) if row.state == Operation.State.QUEUED else "",
        created_at=row.created_at,
        finished_at=row.finished_at,
    )
