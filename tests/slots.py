"""Slots on a test's host: their leftovers, their guests' name look-ups, and their DNS filters."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import dns.message
import dns.query
import dns.rcode
import msgspec

from coppice.host.opened import RoomsOpener, default_rooms
from coppice.linux import netns, nft
from coppice.machine.rooms import Deadlines, Rooms
from coppice.network import Networks
from coppice.network.nat import key_of, refill
from coppice.network.nat.addresses import GATEWAY4, prefix
from coppice.network.nat.helper import take
from coppice.network.nat.pool import Pool
from coppice.network.nat.provider import NatNetwork
from coppice.network.unconnected import Unconnected
from coppice.state.layout import Layout
from coppice.vmm.registry import Drivers
from worlds import Namespace, World


def rooms_with_slots(home: Path, namespace: Path | None, runtime: Path) -> RoomsOpener:
    """Return an opener of a data directory whose slots are on a test's host. `runtime` has its pool
    and a resolv.conf.
    """

    def open_rooms(layout: Layout, drivers: Drivers, deadlines: Deadlines) -> Rooms:
        slots = NatNetwork(home, Pool(key_of(home), namespace, runtime, runtime / "resolv.conf"))
        rooms = default_rooms(layout, drivers, deadlines)
        return msgspec.structs.replace(rooms, networks=Networks([slots, Unconnected()]))

    return open_rooms


def refilling(pool: Pool) -> bool:
    """Return whether slots are being made."""
    try:
        with (pool.root / refill.LOCK).open() as lock:
            return not take(lock.fileno())
    except FileNotFoundError:
        return False


def leftovers(key: str, world: World) -> list[str]:
    """Return all slot resources on a test's host: namespaces, links, tables."""
    tables = world.host.run(lambda: nft.read("list tables"))
    return [
        *(path.name for path in netns.RUNTIME.glob(f"{prefix(key)}*")),
        *world.host.left(prefix(key)),
        *(each["table"]["name"] for each in tables if "table" in each),
    ]


def resolve(own: Namespace, name: str, *, tcp: bool = False) -> str:
    """Return the answer to a guest: an address, or the name of the failure."""

    def ask() -> dns.message.Message:
        query = dns.message.make_query(name, "A")
        return (dns.query.tcp if tcp else dns.query.udp)(query, str(GATEWAY4), timeout=10)

    answer = own.run(ask)
    return answer.answer[0][0].to_text() if answer.answer else dns.rcode.to_text(answer.rcode())


def filters(provider: NatNetwork) -> list[int]:
    """Return the pids of a provider's running DNS filters."""
    words = f"coppice.network.nat.names\0{provider.slots.pool.root}\0".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words in process.read_bytes():
                found.append(int(process.parent.name))
    return found


async def ended(provider: NatNetwork) -> None:
    """Wait until no DNS filter runs: it ends by itself."""
    async with asyncio.timeout(10):
        while filters(provider):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)
