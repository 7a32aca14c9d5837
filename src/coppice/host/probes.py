"""Ask whether the service in a machine works: by a command in the guest, a connection or a request."""

from __future__ import annotations

import asyncio
from typing import Final

from coppice.errors import CoppiceError
from coppice.machine.rooms import Rooms
from coppice.model import HealthCheck, Instance

_LONGEST_ERROR: Final = 200


async def probe(rooms: Rooms, instance: Instance, check: HealthCheck) -> str:
    """Check a Running machine once. Return what is wrong; empty if nothing is."""
    try:
        async with asyncio.timeout(check.timeout_s):
            if check.kind == "exec":
                return await _by_command(rooms, instance, check)
            address = await rooms.networks.of(instance.machine).reach(instance, check.port)
            if address is None:
                return f"port {check.port} of the guest is not published"
            return await (_connects if check.kind == "tcp" else _answers)(*address, check)
    except TimeoutError:
        return f"no answer within {check.timeout_s:g} s"
    except (CoppiceError, OSError) as error:
        return str(error)[:_LONGEST_ERROR]


async def _by_command(rooms: Rooms, instance: Instance, check: HealthCheck) -> str:
    async with rooms.ports(instance).session(check.timeout_s) as session:
        ran = await session.exec(check.command, cwd=check.workdir or None, timeout_s=check.timeout_s)
    if ran.exit_code == 0:
        return ""
    said = (ran.stderr or ran.stdout).decode(errors="replace").strip()
    return f"exit status {ran.exit_code}{': ' if said else ''}{said}"[:_LONGEST_ERROR]


async def _connects(host: str, port: int, _check: HealthCheck) -> str:
    _, writer = await asyncio.open_connection(host, port)
    writer.close()
    return ""


async def _answers(host: str, port: int, check: HealthCheck) -> str:
    import httpx  # of the server's dependencies

    url = httpx.URL(scheme="http", host=host, port=port, raw_path=check.path.encode())
    try:
        async with httpx.AsyncClient(trust_env=False) as client, client.stream("GET", url) as response:
            status = response.status_code
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
    good = status == check.expected_status if check.expected_status else 200 <= status < 400
    return "" if good else f"HTTP status {status}"
