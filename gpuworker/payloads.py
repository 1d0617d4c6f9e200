"""Between the log's canonical bytes and the engine's values."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import numpy as np

from gpuworker.engine.exceptions import EngineError
from gpuworker.engine.types import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
    SampleRequest,
    SampleResult,
    SamplingParams,
    TopkLogprobs,
)
from gpuworker.seats import (
    Consumed,
    Create,
    Load,
    PreparedOperation,
    Record,
    Request,
    Save,
    Unload,
    Unreadable,
)
from gpuworker.snapshots import StorageError
from runs.models import Checkpoint, Operation
from runs.schemas import forward_backward, requests, results
from runs.schemas.sampling import StoredSample
from runs.services.claims import TakenOperation
from runs.services.commits import Result
from runs.services.sample_claims import TakenSample

logger = logging.getLogger(__name__)

EPHEMERAL_TTL_S: Final = 7 * 24 * 3600
Kind = Operation.Kind
Taken = TypeVar("Taken", TakenOperation, TakenSample)


def prepare(taken: TakenOperation, adapter_id: str) -> PreparedOperation:
    """Decode an operation for the engine; one that cannot be decoded, or whose payload is gone, fails alone.

    Raises:
        StorageError: the payload cannot be read just now.
    """
    request: Request = Consumed()
    try:
        if not taken.is_rejected:
            request = _request(fetched(taken, f"operation {taken.seq}"), adapter_id)
    except StorageError:
        raise
    except Exception as error:
        logger.exception("operation %s cannot be read", taken.pk)
        request = Unreadable(f"the operation's payload cannot be read: {type(error).__name__}")
    return PreparedOperation(seq=taken.seq, request=request, taken=replace(taken, inline=None))


def fetched(taken: Taken, what: str) -> Taken:
    """Return an operation or a sample with its payload at hand; `what` is its name in an error.

    Raises:
        FileNotFoundError: it is gone.
        StorageError: it cannot be read just now.
    """
    if not taken.payload_file:
        return taken
    try:
        return replace(taken, inline=taken.payload, payload_file="")
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"the payload of {what} cannot be read: {reason}") from error


def skipped(seq: int) -> PreparedOperation:
    """Return the stand-in for a seq that never came."""
    return PreparedOperation(seq=seq, request=Consumed(), taken=None)


def forward_backward_result(result: ForwardBackwardResult) -> Result:
    """Return what the client reads as ForwardBackwardOutput."""
    return Result(body=results.encode_forward_backward(result.logprobs, result.metrics), is_proto=True)


def json_result(content: dict[str, Any]) -> Result:
    """Return a result that is plain JSON."""
    return Result(body=json.dumps(content, separators=(",", ":"), allow_nan=False).encode())


def error_result(error: EngineError) -> Result:
    """Return a failure as the client is told of it."""
    return Result(error=str(error), category=error.category)


def read_sample(taken: TakenSample) -> StoredSample:
    """Read a sample request as it was stored."""
    return requests.from_canonical(StoredSample, taken.payload)


def sample_request(taken: TakenSample, body: StoredSample, *, max_context: int) -> SampleRequest:
    """Return what the engine draws; a missing seed comes from the operation's number, so that a retry draws the same."""
    prompt = body.prompt.array(place="prompt")
    params = body.sampling_params
    stop_tokens, stop_strings = _stops(params.stop)
    return SampleRequest(
        request_id=str(taken.pk),
        sampler_id=taken.checkpoint_directory or None,
        prompt=prompt,
        params=SamplingParams(
            max_tokens=max_context if params.max_tokens is None else params.max_tokens,
            seed=taken.pk if params.seed is None else params.seed,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            stop_tokens=stop_tokens,
            stop_strings=stop_strings,
        ),
        num_samples=body.num_samples,
        prompt_logprobs=body.prompt_logprobs,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
    )


def sample_result(result: SampleResult, *, num_prompt_logprobs: int | None = None) -> Result:
    """Return what the client reads as SampleResponse."""
    sequences = [
        results.SampledSequence(tokens=one.tokens, logprobs=one.logprobs, stop_reason=one.stop_reason.value)
        for one in result.sequences
    ]
    output = results.SampleOutput(
        sequences=tuple(sequences),
        prompt_logprobs=_last(result.prompt_logprobs, num_prompt_logprobs),
        topk_prompt_logprobs=_topk(result.topk_prompt_logprobs),
    )
    return Result(body=results.encode_sample(output), is_proto=True)


def _last(logprobs: Float32Array | None, count: int | None) -> Float32Array | None:
    """Blank all but the last `count` values."""
    if logprobs is None or count is None or count >= len(logprobs):
        return logprobs
    blanked = logprobs.copy()
    blanked[: len(logprobs) - count] = np.nan
    return blanked


def _topk(topk: TopkLogprobs | None) -> results.TopkLogprobs | None:
    return None if topk is None else results.TopkLogprobs(token_ids=topk.token_ids, logprobs=topk.logprobs)


def _stops(
    stop: str | Sequence[str] | Sequence[int] | None,
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return stop tokens (None: the model's own end tokens) and stop strings."""
    if stop is None:
        return None, ()
    if isinstance(stop, str):
        return None, (stop,)
    tokens = tuple(item for item in stop if isinstance(item, int))
    strings = tuple(item for item in stop if isinstance(item, str))
    return (None if strings else tokens), strings


def _request(taken: TakenOperation, adapter_id: str) -> Request:
    if taken.kind in (Kind.FORWARD, Kind.FORWARD_BACKWARD):
        return _forward_backward(taken.payload, adapter_id)
    if taken.kind == Kind.OPTIM_STEP:
        return _optim_step(taken.payload, adapter_id)
    if taken.kind in (Kind.SAVE_WEIGHTS, Kind.SAVE_WEIGHTS_FOR_SAMPLER):
        return _save(taken)
    if taken.kind == Kind.CREATE_MODEL:
        body = json.loads(taken.payload)
        return Create(load=Load(**body["load"]) if "load" in body else None)
    if taken.kind == Kind.LOAD_WEIGHTS:
        return Load(**json.loads(taken.payload))
    if taken.kind == Kind.RECORD_METRICS:
        return Record(**json.loads(taken.payload))
    assert taken.kind == Kind.UNLOAD_MODEL, taken.kind
    return Unload()


def _forward_backward(payload: bytes, adapter_id: str) -> ForwardBackward:
    body = forward_backward.from_bytes(payload)
    return ForwardBackward(
        adapter_id=adapter_id,
        data=tuple(
            Datum(tokens=datum.tokens, target_tokens=datum.target_tokens, inputs=datum.inputs)
            for datum in body.data
        ),
        loss_fn=body.loss_fn,
        loss_config=body.loss_config,
        backward=not body.forward_only,
    )


def _optim_step(payload: bytes, adapter_id: str) -> OptimStep:
    params = requests.from_canonical(requests.OptimStep, payload).adam_params
    return OptimStep(
        adapter_id=adapter_id,
        params=AdamParams(
            learning_rate=params.learning_rate,
            beta1=params.beta1,
            beta2=params.beta2,
            eps=params.eps,
            weight_decay=params.weight_decay,
            grad_clip_norm=params.grad_clip_norm,
        ),
    )


def _save(taken: TakenOperation) -> Save:
    if taken.kind == Kind.SAVE_WEIGHTS:
        body = requests.from_canonical(requests.SaveWeights, taken.payload)
        return Save(
            kind=Checkpoint.Kind.TRAINING,
            name=body.path,
            overwrite=body.overwrite,
            ttl_seconds=body.ttl_seconds,
            user_metadata=body.user_metadata or {},
        )
    sampler = requests.from_canonical(requests.SaveWeightsForSampler, taken.payload)
    return Save(
        kind=Checkpoint.Kind.SAMPLER,
        name=sampler.path or f".{taken.seq}",  # no user's name starts with a dot
        ttl_seconds=sampler.ttl_seconds if sampler.path else EPHEMERAL_TTL_S,
        user_metadata=sampler.user_metadata or {},
        sampling_session_seq=None if sampler.path else sampler.sampling_session_seq_id,
    )
