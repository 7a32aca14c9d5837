"""Errors as HTTP responses: one shape, `{code, message, hint}`, and no retry of a final answer.

The clients of the hypeman API repeat 409 and all 5xx unless `x-should-retry: false` is set. So it is
set for every error but those that a later attempt can mend.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException
from litestar.routes import HTTPRoute
from litestar.status_codes import HTTP_500_INTERNAL_SERVER_ERROR

from coppice.errors import Busy, CoppiceError, GuestRefused, Overloaded, TooManyOperations, Unauthorized
from coppice.model import Record

_log = logging.getLogger(__name__)
_RETRY_AFTER_S: Final = 1
NAMES: Final = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "rate_limited",
}
"""The codes of the framework's errors, by status."""
_PARAMETERS: Final = {
    "wanted": "state",
    "origin": "source",
    "place": "path",
    "longest": "timeout",
    "last_id": "Last-Event-ID",
}
"""Names of query parameters that are other names in the handlers."""


class Failure(Record, frozen=True, kw_only=True):
    """The body of every error."""

    code: str
    message: str
    hint: str | None = None


class GuestFailure(Failure, frozen=True, kw_only=True):
    """The body of an error that the guest's kernel gave."""

    errno: int


def code_of(error: BaseException) -> str:
    """Return the code of any error; `cancelled` for a cancellation."""
    if isinstance(error, CoppiceError):
        return error.code
    if isinstance(error, HTTPException):
        return NAMES.get(error.status_code, "error")
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "internal_error"


def failure_of(error: Exception) -> tuple[int, Failure]:
    """Return the HTTP status and the body for any error."""
    if isinstance(error, GuestRefused):
        return error.http_status, GuestFailure(
            code=code_of(error), message=error.message, hint=error.hint, errno=error.errno
        )
    if isinstance(error, CoppiceError):
        return error.http_status, Failure(code=code_of(error), message=error.message, hint=error.hint)
    if isinstance(error, HTTPException):
        return error.status_code, Failure(code=code_of(error), message=_detail(error))
    _log.error("internal error", exc_info=error)
    return HTTP_500_INTERNAL_SERVER_ERROR, Failure(
        code=code_of(error), message=f"internal error: {type(error).__name__}", hint="see the server's log"
    )


def _detail(error: HTTPException) -> str:
    """Return the message of a framework's error, with the reasons of a failed validation."""
    reasons = [_reason(each) if isinstance(each, dict) else str(each) for each in error.extra or []]
    return "; ".join([error.detail, *reasons] if reasons else [error.detail])


def _reason(reason: dict[str, Any]) -> str:
    """Return one reason of a failed validation, with the field that it is about as a client knows it."""
    message, field = str(reason.get("message", reason)), reason.get("key")
    if (field, message) == ("data", "'data'"):
        return "the request has no body"
    return f"{_PARAMETERS.get(field, field)}: {message}" if field else message


def is_transient(error: Exception) -> bool:
    """Return whether the request had no effect, and the same request may succeed later."""
    if isinstance(error, HTTPException):
        return error.status_code in (429, 503)
    return isinstance(error, Busy | TooManyOperations | Overloaded)


def headers_of(error: Exception) -> dict[str, str]:
    """Return the headers that tell a client whether to try again."""
    headers = {"x-should-retry": "false"}
    if is_transient(error):
        reset = (getattr(error, "headers", None) or {}).get("RateLimit-Reset")
        headers = {"retry-after": str(max(_RETRY_AFTER_S, int(reset or 0)))}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return headers


def respond(request: Request[Any, Any, Any], error: Exception) -> Response[Failure]:
    """Return the response for an error of a handler."""
    status, failure = failure_of(error)
    headers = headers_of(error)
    if isinstance(error, MethodNotAllowedException):
        headers["allow"] = ", ".join(sorted(_methods(request)))
    return Response(failure, status_code=status, headers=headers, media_type="application/json")


def _methods(request: Request[Any, Any, Any]) -> set[str]:
    """Return the methods of a path (RFC 9110, section 15.5.6)."""
    parts = [each for each in request.scope["path"].split("/") if each]
    routes = (
        each for each in request.app.routes if isinstance(each, HTTPRoute) and _leads(each.path_components, parts)
    )
    return {str(method) for route in routes for method in route.methods}


def _leads(components: Sequence[object], parts: Sequence[str]) -> bool:
    """Return whether a path has the components of a route, in which a parameter is any text."""
    return len(components) == len(parts) and all(
        not isinstance(one, str) or one == other for one, other in zip(components, parts, strict=True)
    )
