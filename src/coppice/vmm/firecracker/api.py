"""Firecracker's API: HTTP over a unix socket in the instance's directory, one connection for a few
requests.

A successful request is answered by 204 without a body (a query by 200), a failed one by 400 with a
`fault_message`. Firecracker answers when the work is done, so no polling is needed.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from coppice.errors import NoSpace, VmmDied, VmmError, VmmTimeout
from coppice.vmm import sockets

SOCKET: Final = "api.sock"
DEADLINE_S: Final = 15.0
_ANSWER_MOST: Final = 1 << 20
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})\b")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_SEE_LOG = "see its log with `coppice logs --vmm NAME`"


class Request(NamedTuple):
    """One request. Its body is JSON."""

    method: str
    path: str
    body: Mapping[str, object] | None = None


class Fault(VmmError):
    """Firecracker refused a request. `said` is its own message."""

    def __init__(self, request: Request, said: str) -> None:
        super().__init__(f"Firecracker refused {request.method} {request.path}: {said}", hint=_SEE_LOG)
        self.said = said


async def ask(directory: Path, *requests: Request, deadline_s: float = DEADLINE_S) -> Any:
    """Make requests, one after the other; return the decoded body of the last answer, None if it is
    empty.

    :raises Fault: Firecracker refused a request; later requests are not made
    :raises NoSpace: it refused a request because the disk is full
    :raises VmmDied: nothing listens, or Firecracker closed the connection
    :raises VmmError: its answer is not understood
    :raises VmmTimeout: it did not answer all of them within `deadline_s`
    """
    try:
        connected = sockets.connect(directory, SOCKET)
    except OSError as error:
        raise VmmDied(
            f"the VMM does not answer: {error.strerror}", hint="see the machine's state with `coppice inspect NAME`"
        ) from error
    result = None
    with connected:
        try:
            async with asyncio.timeout(deadline_s):
                for request in requests:
                    result = await _exchange(connected, request)
        except TimeoutError as error:
            raise VmmTimeout(f"the VMM did not answer within {deadline_s:g} s", hint=_SEE_LOG) from error
        except OSError as error:
            raise VmmDied(f"Firecracker hung up: {error.strerror or error}", hint=_SEE_LOG) from error
    return result


async def _exchange(connected: socket.socket, request: Request) -> Any:
    loop = asyncio.get_running_loop()
    body = b"" if request.body is None else json.dumps(request.body).encode()
    head = f"{request.method} {request.path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    await loop.sock_sendall(connected, head.encode() + b"\r\n" + body)
    said = b""
    while (answer := _parse(request, said)) is None:
        if not (more := await loop.sock_recv(connected, 1 << 16)):
            raise VmmDied(f"Firecracker hung up during {request.method} {request.path}", hint=_SEE_LOG)
        said += more
    status, content = answer
    if status == 200 or status == 204:
        return content
    fault = content.get("fault_message") if isinstance(content, dict) else None
    if not isinstance(fault, str):
        raise _not_understood(request, said)
    if "os error 28" in fault:  # ENOSPC
        raise NoSpace(f"the disk is full: {fault}", hint="free disk space")
    raise Fault(request, fault)


def _parse(request: Request, said: bytes) -> tuple[int, Any] | None:
    """Return the status and the decoded body of an answer, or None if it is incomplete."""
    head, complete, rest = said.partition(b"\r\n\r\n")
    if not complete:
        if len(said) > _ANSWER_MOST or not b"HTTP/1.".startswith(said[:7]):
            raise _not_understood(request, said)
        return None
    status, found = _STATUS.match(head), _LENGTH.search(head)
    length = int(found[1]) if found else 0
    if status is None or length > _ANSWER_MOST:
        raise _not_understood(request, said)
    body = rest[:length]
    if len(body) < length:
        return None
    try:
        return int(status[1]), json.loads(body) if body else None
    except ValueError as error:
        raise _not_understood(request, said) from error


def _not_understood(request: Request, said: bytes) -> VmmError:
    return VmmError(
        f"Firecracker's answer to {request.method} {request.path} was not understood: {said[:200]!r}", hint=_SEE_LOG
    )
