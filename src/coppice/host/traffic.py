"""Count the bytes that cross the NICs of Running machines.

A network that passes the frames through the kernel counts them there. No other one counts them, so
the guest is asked for the counters of its card, and may lie. This keeps no machine from an
automatic standby.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from coppice.agent.client import Session
from coppice.errors import CoppiceError
from coppice.machine.rooms import Rooms
from coppice.model import Instance, Traffic

_log = logging.getLogger(__name__)
LINKS: Final = "/sys/class/net"
COUNTERS: Final = "/proc/net/dev"
_VIRTUAL: Final = "/virtual/"  # in the link of a loopback, a bridge, or the like
_LARGEST: Final = 1 << 20
_MOST: Final = 1 << 64
_PATIENCE_S: Final = 5.0


async def traffic_of(rooms: Rooms, instance: Instance, *, ask: bool) -> Traffic | None:
    """Return the traffic of a Running machine. None: nothing counts it, or the guest does not answer.

    :param ask: ask the guest if its network does not count
    """
    try:
        counted = await rooms.networks.of(instance.machine).traffic(instance)
        if counted is not None or not ask:
            return counted
        async with asyncio.timeout(_PATIENCE_S):
            async with rooms.ports(instance).session(_PATIENCE_S, patience_s=_PATIENCE_S) as session:
                return await _by_guest(session)
    except (CoppiceError, TimeoutError) as error:
        _log.info("the traffic of %s is not known: %s", instance.name, error)
        return None


async def _by_guest(session: Session) -> Traffic | None:
    """Return the counters of the card that the host gave the guest. The guest's own bridges and the
    like carry the same frames again.
    """
    card = None
    async for entry in session.listing(LINKS):  # to its end: the connection is used again
        if card is None and entry.link_target and _VIRTUAL not in entry.link_target:
            card = entry.path.rpartition("/")[2]
    lines = (await session.read_file(COUNTERS, max_bytes=_LARGEST)).decode(errors="replace").splitlines()
    for name, _, numbers in (line.partition(":") for line in lines):
        fields = numbers.split()
        if name.strip() == card and len(fields) > 8:
            received, sent = _number(fields[0]), _number(fields[8])
            if received is not None and sent is not None:
                return Traffic(received_bytes=received, sent_bytes=sent, counted_by="guest")
    return None


def _number(text: str) -> int | None:
    """Return a counter of the kernel; None if the text is none."""
    if len(text) > 20 or not (text.isascii() and text.isdigit()):
        return None
    return found if (found := int(text)) < _MOST else None
