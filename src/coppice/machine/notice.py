"""The notice of a fork to a process that was warm in its source: one HTTP request.

No process is started for it, and the process that takes it needs no other work before the fork's
first request. The fork is Running only after the process has taken the notice.
"""

from __future__ import annotations

import asyncio
from typing import Final

from coppice.agent.http import ask
from coppice.agent.protocol import readable
from coppice.errors import CoppiceError, GuestRefused, GuestTimeout
from coppice.flow import named
from coppice.machine.identity import next_serial
from coppice.machine.rooms import Rooms
from coppice.model import Instance

PATH: Final = "/coppice/fork"
_DEADLINE_S: Final = 30.0  # as for a hook
_SAID_BYTES: Final = 600


async def deliver(rooms: Rooms, instance: Instance, payload: bytes | None) -> None:
    """Send a new machine's name, id, serial and payload to the process that its record names.

    :raises GuestRefused: nothing listens there, or the process answers with an error
    :raises GuestTimeout: it does not answer in time
    """
    to = instance.process.notify
    if to is None:
        raise AssertionError("only a machine with an endpoint gets a notice")
    where = f"the process at {named(to)}"
    headers = {
        "Content-Type": "application/octet-stream",
        "Coppice-Name": instance.name,
        "Coppice-Id": instance.id,
        "Coppice-Serial": str(next_serial(instance)),
    }
    hint = f"it must answer POST {PATH} with a status of 2xx; --notify none forks without a notice"
    try:
        async with (
            asyncio.timeout(_DEADLINE_S),
            rooms.ports(instance).session(_DEADLINE_S) as session,
            session.connect(to) as connection,
        ):
            answer = await ask(connection, "POST", PATH, headers=headers, body=payload or b"", most_bytes=_SAID_BYTES)
    except TimeoutError as error:
        raise GuestTimeout(f"{where} did not take the fork's notice within {_DEADLINE_S:g} s", hint=hint) from error
    except GuestRefused as error:
        raise GuestRefused(f"notice of the fork: {error.message}", errno=error.errno, hint=hint) from error
    except CoppiceError as error:
        raise type(error)(f"{where} did not take the fork's notice: {error.message}", hint=hint) from error
    if not 200 <= answer.status < 300:
        said = readable(answer.body).strip()
        raise GuestRefused(
            f"{where} answered the fork's notice with HTTP status {answer.status}{': ' if said else ''}{said}",
            hint=hint,
        )
