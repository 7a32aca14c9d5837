"""Ask whether the service in a machine works: by a command in the guest, a connection or a request.

Connections and requests go through the agent to the guest's own loopback, so they need no published
port, and work on every network.
"""

from __future__ import annotations

import asyncio
from typing import Final

from coppice.agent.client import Session
from coppice.agent.http import ask
from coppice.errors import CoppiceError
from coppice.machine.rooms import Rooms
from coppice.model import HealthCheck, Instance

_LONGEST_ERROR: Final = 200


async def probe(rooms: Rooms, instance: Instance, check: HealthCheck) -> str:
    """Check a Running machine once. Return what is wrong; empty if nothing is."""
    try:
        async with asyncio.timeout(check.timeout_s), rooms.ports(instance).session(check.timeout_s) as session:
            match check.kind:
                case "exec":
                    return await _by_command(session, check)
                case "http":
                    return await _answers(session, check)
                case _:
                    async with session.connect(check.port):
                        return ""
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


async def _answers(session: Session, check: HealthCheck) -> str:
    async with session.connect(check.port) as connection:
        status = (await ask(connection, "GET", check.path)).status
    good = status == check.expected_status if check.expected_status else 200 <= status < 400
    return "" if good else f"HTTP status {status}"
