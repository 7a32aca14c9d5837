"""Errors that a server reports, as exceptions."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from coppice.client.remote.address import Address
from coppice.errors import CoppiceError, Forbidden, GuestRefused, HostCannot, Unauthorized, UsageError, kind_of

_REFUSALS: Final = {401: Unauthorized, 403: Forbidden}


def encoded(message: object) -> bytes:
    """Return a message to a server as JSON.

    :raises UsageError: it has text that is not UTF-8, which JSON cannot carry
    """
    try:
        return msgspec.json.encode(message)
    except UnicodeEncodeError as error:
        raise UsageError(
            "the request has text that is not UTF-8", hint="run the command on the server's machine, without --host"
        ) from error


def refusal(status: int, body: bytes) -> CoppiceError:
    """Return the exception for a WebSocket that was refused, whose answer may have no body."""
    if status in _REFUSALS and not body.startswith(b"{"):
        return _REFUSALS[status]("the server refuses the token", hint="make one with `coppice token create`")
    return error_from(body)


def error_from(body: bytes) -> CoppiceError:
    """Return the exception for the JSON body of an error."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        error = kind_of(str(fields["code"]))(str(fields["message"]), hint=fields.get("hint"))
        if isinstance(error, GuestRefused) and isinstance(number := fields.get("errno"), int):
            error.errno = number
        return error
    except (msgspec.MsgspecError, KeyError):
        return HostCannot("the server's answer is not that of Coppice", hint="check the address")


def unreachable(address: Address, error: Exception) -> HostCannot:
    """Return the error for a server that does not answer."""
    where = address.socket or address.url
    reason = str(error) or type(error).__name__
    return HostCannot(f"the server at {where} does not answer: {reason}", hint="start it with `coppice serve`")
