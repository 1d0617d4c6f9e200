"""Waiting for an operation's answer.

A client polls again at once when it hears "not yet", so the request is held here until the operation
is finished or nearly too long for the client's patience.
"""

from __future__ import annotations

import asyncio
import contextlib

from runs import ids
from runs.api import waiters
from runs.api.decorators import ApiRequest, Reply, in_thread, json_reply
from runs.exceptions import ResultExpired
from runs.models import Operation
from runs.schemas import requests, responses, results
from runs.schemas.parsing import validate
from runs.services import access, waiting


async def retrieve_future(request: ApiRequest) -> Reply:
    """Answer with the result, the failure, or 408 "not yet" after holding the request."""
    body = validate(requests.RetrieveFuture, request.body)
    pk = ids.parse_request_id(body.request_id)
    with waiters.operations.parked(pk) as finished:
        operation = await in_thread(lambda: access.get_operation(request.user, pk))
        if operation.state == Operation.State.QUEUED:
            await _wait(finished, request.hold_s)
            operation = await in_thread(lambda: access.get_operation(request.user, pk))
    if operation.state == Operation.State.QUEUED:
        return await in_thread(lambda: _not_yet(operation))
    return _answer(operation, accepts_proto=request.accepts_proto, accepts_json=request.accepts_json)


async def _wait(finished: asyncio.Event, hold_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(finished.wait(), hold_s)


def _not_yet(operation: Operation) -> Reply:
    reason = waiting.reason_of(operation)
    state = "paused_capacity" if reason else "active"
    content = responses.try_again(operation.request_id, state, reason=reason or None)  # type: ignore[arg-type]
    return json_reply(dict(content), status=408)


def _answer(operation: Operation, *, accepts_proto: bool, accepts_json: bool) -> Reply:
    if operation.state == Operation.State.FAILED:
        return json_reply({"error": operation.error, "category": operation.error_category or "unknown"})
    if operation.result is None:
        raise ResultExpired
    body = bytes(operation.result)
    if not operation.result_is_proto:
        return Reply(body=body)
    is_sample = operation.kind == Operation.Kind.SAMPLE
    is_misread = accepts_json and not is_sample and results.has_mixed_shapes(body)
    if accepts_proto and not is_misread:
        return Reply(body=body, content_type="application/x-protobuf")
    render = results.render_sample_json if is_sample else results.render_forward_backward_json
    return Reply(body=render(body))
