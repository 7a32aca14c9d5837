"""One HTTP request to a server in a guest, over a connection through the agent.

The request is of HTTP/1.1, because some servers (Chromium's DevTools) do not answer older ones. Only
the answer's status and its beginning are read: a guest can send anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from coppice.errors import GuestError
from coppice.model import Record
from coppice.model.guest import Connection

_LONGEST_HEAD: Final = 65536
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r\n]")


class Answer(Record, frozen=True, kw_only=True):
    """The status of an answer, and the beginning of its body."""

    status: int
    body: bytes


async def ask(
    connection: Connection,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    most_bytes: int = 0,
) -> Answer:
    """Send a request and return the answer, with at most `most_bytes` of its body. Set a deadline.

    :raises GuestError: the answer is not one of HTTP
    """
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "User-Agent: coppice", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += [f"Content-Length: {len(body)}"] if body or method == "POST" else []
    await connection.send("\r\n".join([*lines, "", ""]).encode() + body)
    received = b""
    while (end := received.find(b"\r\n\r\n")) < 0:
        chunk = await connection.receive()
        received += chunk
        if not chunk or len(received) > _LONGEST_HEAD:
            raise _no_answer()
    status = _STATUS.match(received)
    if status is None:
        raise _no_answer()
    rest = received[end + 4 :]
    while len(rest) < most_bytes and (chunk := await connection.receive()):
        rest += chunk
    return Answer(status=int(status[1]), body=rest[:most_bytes])


def _no_answer() -> GuestError:
    return GuestError(
        "the server in the guest sent no answer of HTTP", hint="see whether it speaks HTTP at this port or socket"
    )
