"""Ask whether the service in a machine works: by a command in the guest, a connection or a request."""

from __future__ import annotations

import asyncio
import re
from typing import Final

from coppice.agent.client import Session
from coppice.errors import CoppiceError
from coppice.machine.rooms import Rooms
from coppice.model import HealthCheck, Instance
from coppice.model.guest import Connection

_LONGEST_ERROR: Final = 200
_LONGEST_LINE: Final = 1024
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r\n]")


async def probe(rooms: Rooms, instance: Instance, check: HealthCheck) -> str:
    """Check a Running machine once. Return what is wrong; empty if nothing is.

    The agent connects in the guest. So a server on the guest's loopback is reached too, and QEMU's
    user-mode network, which accepts connections that no server takes, is not asked.
    """
    try:
        async with asyncio.timeout(check.timeout_s), rooms.ports(instance).session(check.timeout_s) as session:
            if check.kind == "exec":
                return await _by_command(session, check)
            async with session.connect(check.port) as connection:
                return "" if check.kind == "tcp" else await _answers(connection, check)
    except TimeoutError:
        return f"no answer within {check.timeout_s:g} s"
    except (CoppiceError, OSError) as error:
        return str(error)[:_LONGEST_ERROR]


async def _by_command(session: Session, check: HealthCheck) -> str:
    ran = await session.exec(check.command, cwd=check.workdir or None, timeout_s=check.timeout_s)
    if ran.exit_code == 0:
        return ""
    said = (ran.stderr or ran.stdout).decode(errors="replace").strip()
    return f"exit status {ran.exit_code}{': ' if said else ''}{said}"[:_LONGEST_ERROR]


async def _answers(connection: Connection, check: HealthCheck) -> str:
    """Read no more than the first line: the HTTP libraries are not installed with the command line."""
    lines = (f"GET {check.path} HTTP/1.1", f"Host: localhost:{check.port}", "User-Agent: coppice", "Connection: close")
    await connection.send("".join(f"{line}\r\n" for line in (*lines, "")).encode())
    said = b""
    while b"\n" not in said and len(said) < _LONGEST_LINE and (data := await connection.receive()):
        said += data
    line = _STATUS_LINE.match(said)
    if line is None:
        return "the answer is not HTTP" if said else "it closed the connection without an answer"
    status = int(line[1])
    good = status == check.expected_status if check.expected_status else 200 <= status < 400
    return "" if good else f"HTTP status {status}"
