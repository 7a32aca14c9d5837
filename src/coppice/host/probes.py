"""Ask whether the service in a machine works: by a command in the guest, a connection, a request, or
a line of its console.

Connections and requests go through the agent to the guest's own loopback, so they need no published
port, and work on every network.
"""

from __future__ import annotations

import asyncio
from typing import Final

from coppice.agent.client import Session
from coppice.agent.http import ask
from coppice.completion import in_thread
from coppice.errors import CoppiceError
from coppice.host import process
from coppice.machine.console import Search
from coppice.machine.rooms import Rooms
from coppice.model import HealthCheck, Instance
from coppice.model.instance import said

_LONGEST_ERROR: Final = 200


class Probe:
    """The check of one run of a machine, which can be made again and again."""

    def __init__(self, rooms: Rooms, instance: Instance, check: HealthCheck) -> None:
        self._rooms = rooms
        self._instance = instance
        self._check = check
        self._search = Search(rooms.directory(instance.id), instance, check.text)

    async def failure(self) -> str:
        """Check the Running machine once. Return what is wrong; empty if nothing is."""
        check = self._check
        try:
            async with asyncio.timeout(check.timeout_s):
                if check.kind == "log":
                    return await self._by_line()
                async with self._rooms.ports(self._instance).session(check.timeout_s) as session:
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

    async def _by_line(self) -> str:
        if not await in_thread(self._search.found):
            return f"its console does not show {self._check.text!r}"[:_LONGEST_ERROR]
        end = await process.ask(self._rooms, self._instance)  # the line is of the past
        return f"its process {said(end)}" if end and end.exit_code else ""


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
