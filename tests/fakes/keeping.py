"""Keep fake guests alive after the process that started their VMMs has died, as real guests are.

The starting process hands each guest over to a keeper process: its listening sockets, and the VMM
process it lives in. All other state of a guest is in the RAM of that VMM.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from coppice.model import Record, VmmProcess
from coppice.vmm import driver as files
from fakes.doubled import HandedOver
from fakes.driver import FakeDriver
from fakes.guest import FakeGuest

_GUESTS = {kind.__name__: kind for kind in (FakeGuest, HandedOver)}
_MESSAGE_MAX = 1 << 16


class _Kept(Record, frozen=True, kw_only=True):
    """A guest without its listening sockets, which are sent as file descriptors."""

    kind: str
    directory: str
    process: VmmProcess


def hand_over(channel: socket.socket, guest: FakeGuest) -> None:
    """Send a guest that serves no port yet to the keeper."""
    kept = _Kept(kind=type(guest).__name__, directory=str(guest.directory), process=guest.process)
    socket.send_fds(channel, [msgspec.json.encode(kept)], [each.fileno() for each in guest.listeners])
    for listener in guest.listeners:
        listener.close()


@contextlib.contextmanager
def keeping(driver: FakeDriver) -> Iterator[int]:
    """Run the guests that are handed over in this event loop, like the driver's own guests. Yield
    the file descriptor for `hand_over`.
    """
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own.setblocking(False)

    def take() -> None:
        message, descriptors, _, _ = socket.recv_fds(own, _MESSAGE_MAX, files.PORTS)
        kept = msgspec.json.decode(message, type=_Kept)
        listeners = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for listener in listeners:
            listener.setblocking(False)
        driver.serve(kept.process, _GUESTS[kept.kind](Path(kept.directory), kept.process, listeners, driver.faults))

    loop = asyncio.get_running_loop()
    with own, other:
        loop.add_reader(own, take)
        try:
            yield other.fileno()
        finally:
            loop.remove_reader(own)
