"""Errors that reach a client; each knows its code, HTTP status and category.

MintError                500  server
+ RequestInvalid         422  user    the body or a value in it is wrong; `place` says where
  + BaseModelAway        422  user    a base model has no use just now; what is made on it already waits
+ NotAuthenticated       401  user    no key, a malformed key, or one that was revoked
+ OperatorsOnly          403  user    only a person with staff rights may do this
+ NotFound               404  user    no such object, or not yours: both look the same
+ MethodNotAllowed       405  user
+ BodyTooSlow            408  user    the SDK sends the request again
+ PayloadTooLarge        413  user
+ UnsupportedMedia       415  user    content type or content encoding
+ SequenceConflict       422  user    a seq_id came again with another request
+ StillAnswering         409  user    REST only: the first request with this Idempotency-Key is not done yet
+ PreconditionFailed     412  user    REST only: the object changed since the ETag of If-Match
+ RateLimited            429  server  come back later; the SDK waits and sends again
+ SessionFinished        410  user    the SDK session was closed
+ ResultExpired          410  user    the answer was deleted; it is kept for a day
+ OperationFailed        200  either  a failed operation, told in its result
+ TokenRefused           403  user    a request by a browser without the page's token
+ OffsetConflict         409  user    an upload goes on elsewhere than where its file ends
+ UploadBusy             423  server  another request is writing to the same upload
+ ChecksumMismatch       460  user    a part of an upload arrived changed; it was not kept
+ DiskFull               507  server

The SDK's endpoints never answer 409: the client SDKs retry it for minutes. 409, 423 and 460 are words of tus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

Category = Literal["user", "server", "unknown"]


class MintError(Exception):
    """The server failed; the request can be sent again."""

    code: ClassVar[str] = "server_error"
    http_status: ClassVar[int] = 500
    category: Category = "server"

    def __init__(self, message: str | None = None, *, place: str = "") -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.place = place
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.place))


def _rebuild(cls: type[MintError], message: str, place: str) -> MintError:
    return cls(message, place=place)


class RequestInvalid(MintError):
    """the request is not valid"""

    code = "invalid_request"
    http_status = 422
    category = "user"

    def __init__(
        self, message: str | None = None, *, place: str = "", problems: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message, place=place)
        # Every (place, message), where several things are wrong; `message` tells them all in one sentence.
        self.problems = tuple(problems) or ((place, self.message),)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_invalid, (type(self), self.message, self.place, self.problems))


def _rebuild_invalid(
    cls: type[RequestInvalid], message: str, place: str, problems: Sequence[tuple[str, str]]
) -> RequestInvalid:
    return cls(message, place=place, problems=problems)


class BaseModelAway(RequestInvalid):
    """the base model is not on offer, could not be loaded, or its files are not on this machine"""


class NotAuthenticated(MintError):
    """a valid API key is needed: send it as the X-API-Key header"""

    code = "not_authenticated"
    http_status = 401
    category = "user"


class OperatorsOnly(MintError):
    """only an operator may do this: a person whose account has staff rights"""

    code = "operators_only"
    http_status = 403
    category = "user"


class NotFound(MintError):
    """there is no such object"""

    code = "not_found"
    http_status = 404
    category = "user"


class MethodNotAllowed(MintError):
    """this address does not take this method"""

    code = "method_not_allowed"
    http_status = 405
    category = "user"


class BodyTooSlow(MintError):
    """the request body did not arrive in time; send the request again"""

    code = "body_too_slow"
    http_status = 408
    category = "user"


class PayloadTooLarge(MintError):
    """the request body is too large"""

    code = "payload_too_large"
    http_status = 413
    category = "user"


class UnsupportedMedia(MintError):
    """this content type or encoding is not understood"""

    code = "unsupported_media"
    http_status = 415
    category = "user"


class SequenceConflict(MintError):
    """this seq_id was already used by another request"""

    code = "sequence_conflict"
    http_status = 422
    category = "user"


class StillAnswering(MintError):
    """the first request with this Idempotency-Key is still being answered; send this one again in a moment"""

    code = "still_answering"
    http_status = 409
    category = "user"


class PreconditionFailed(MintError):
    """the object is no longer the one that If-Match names; read it again"""

    code = "precondition_failed"
    http_status = 412
    category = "user"


class RateLimited(MintError):
    """too many operations are waiting; send this one again in a moment"""

    code = "rate_limited"
    http_status = 429
    category = "server"


class ResultExpired(MintError):
    """the answer to this request was deleted; answers are kept for 24 hours"""

    code = "result_expired"
    http_status = 410
    category = "user"


class SessionFinished(MintError):
    """this session was finished; start a new one"""

    code = "session_finished"
    http_status = 410
    category = "user"


class OperationFailed(MintError):
    """the operation failed"""

    code = "operation_failed"
    http_status = 200

    def __init__(self, message: str | None = None, *, place: str = "", category: Category = "server") -> None:
        super().__init__(message, place=place)
        self.category = category

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_failed, (self.message, self.place, self.category))


def _rebuild_failed(message: str, place: str, category: Category) -> OperationFailed:
    return OperationFailed(message, place=place, category=category)


class TokenRefused(MintError):
    """the page's token is missing or out of date; reload the page"""

    code = "token_refused"
    http_status = 403
    category = "user"


class OffsetConflict(MintError):
    """the upload is not at this offset"""

    code = "offset_conflict"
    http_status = 409
    category = "user"


class UploadBusy(MintError):
    """another request is writing to this upload; ask for its offset and send again"""

    code = "upload_busy"
    http_status = 423


class ChecksumMismatch(MintError):
    """the bytes do not have the checksum that was sent with them; send them again"""

    code = "checksum_mismatch"
    http_status = 460
    category = "user"


class DiskFull(MintError):
    """the server's disk is full; send this again once there is room"""

    code = "disk_full"
    http_status = 507
