"""The filter of names: a process that answers DNS questions of guests, for the names that they may
resolve.

It asks this host's name servers, and lets the slot reach the addresses of an answer before it
returns the answer. Each data directory has one filter, started by the first slot that needs it. It
reads its tasks from the files of the pool, and ends when no slot needs it. While it does not run,
these guests resolve nothing.

A process that needs the filter asks it on a unix socket whether it serves. The filter stops
listening there in the same step in which it finds that no slot needs it. So an answer proves that
it has seen the caller's policy. Its lock keeps a second filter from starting.

A question comes from the address of its slot, which the guest cannot forge: the slot's NAT writes
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
import sys
import time
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Final

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdatatype

from coppice.linux import netns, nft
from coppice.model import Egress
from coppice.network.nat import addresses, egress, resolver
from coppice.network.nat.addresses import Slot
from coppice.network.nat.filtering import SERVING, needs_names, read_policy, read_refused
from coppice.network.nat.rules import dns_port

_ANSWER_S: Final = 5.0
_LOOK_S: Final = 1.0  # between looks at whether it is needed
_AT_ONCE: Final = 256
_LARGEST: Final = 4096
_REMEMBERED: Final = 256  # refused names of one slot
_IP_FREEBIND: Final = 15
_BIND_S: Final = 5.0
_BIND_PAUSE_S: Final = 0.01


class Names:
    """The filter of one data directory, in the network namespace of its host."""

    def __init__(self, root: Path, key: str, resolv_conf: Path) -> None:
        self._root, self._key, self._resolv_conf = root, key, resolv_conf
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, lock: int, asked: socket.socket) -> None:
        """Answer questions until no slot needs the filter.

        `lock` is held on a file of the pool. If the path names another file now, the pool is gone.
        """
        datagrams = await self._bound(socket.SOCK_DGRAM)
        stream = await self._bound(socket.SOCK_STREAM)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=datagrams)
        server = await asyncio.start_server(self._connection, sock=stream)
        asked.setblocking(False)
        loop.add_reader(asked, _say_serving, asked)
        while self._is_needed(lock):  # noqa: ASYNC110 - files of other processes: there is no event
            await asyncio.sleep(_LOOK_S)
        loop.remove_reader(asked)
        asked.close()
        server.close()
        transport.close()

    def _is_needed(self, lock: int) -> bool:
        try:
            current = os.path.samestat(os.fstat(lock), (self._root / "names.lock").stat())
        except FileNotFoundError:
            return False
        return current and any(map(needs_names, list((self._root / "egress").glob("[0-9]*"))))

    async def _bound(self, kind: socket.SocketKind) -> socket.socket:
        """Return a socket that is bound to the filter's address.

        The one of a killed filter may still be bound when its lock is free.
        """
        bound = socket.socket(socket.AF_INET, kind)
        if kind == socket.SOCK_STREAM:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier filter
        bound.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)  # the address comes and goes with the slots
        bound.setblocking(False)
        end = time.monotonic() + _BIND_S
        while True:
            try:
                bound.bind((str(addresses.HOST4), dns_port(self._key)))
                return bound
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() >= end:
                    raise
            await asyncio.sleep(_BIND_PAUSE_S)

    def datagram(self, transport: asyncio.DatagramTransport, data: bytes, peer: tuple[str, int]) -> None:
        """Answer one datagram, or drop it if too many are being answered."""
        if self._turns.locked():
            return

        async def work() -> None:
            async with self._turns:
                answer = await self.answer(data, peer[0])
                if answer is not None:
                    transport.sendto(_packed(answer, data), peer)

        task = asyncio.get_running_loop().create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(2 * _ANSWER_S), self._turns:
                (size,) = struct.unpack(">H", await reader.readexactly(2))
                answer = await self.answer(await reader.readexactly(size), writer.get_extra_info("peername")[0])
                if answer is not None:
                    wire = answer.to_wire()
                    writer.write(struct.pack(">H", len(wire)) + wire)
                    await writer.drain()
        writer.close()

    async def answer(self, data: bytes, peer: str) -> dns.message.Message | None:
        """Return the answer to a slot's question; None if it is not a question, or no server
        answered.
        """
        try:
            query = dns.message.from_wire(data)
        except dns.exception.DNSException:
            return None
        if query.flags & dns.flags.QR:
            return None
        slot = self._slot_of(peer)
        if slot is None or query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
            return _refusal(query)
        name = query.question[0].name.to_text(omit_final_dot=True).lower()
        policy = read_policy(self._root / "egress" / str(slot.number), default=Egress(mode="none"))
        if not egress.may_resolve(policy, name):
            await asyncio.to_thread(self._remember, slot, name)
            return _refusal(query)
        answer = await self._ask(query)
        if answer is not None and policy.mode == "allow":
            found = _addresses(answer)
            if found:
                await asyncio.to_thread(netns.inside, slot.namespace, lambda: nft.apply(egress.admit(found)))
        return answer

    def _slot_of(self, peer: str) -> Slot | None:
        number = int(IPv4Address(peer)) - int(addresses.OUTSIDE4.network_address)
        return Slot(self._key, number) if number in addresses.NUMBERS else None

    async def _ask(self, query: dns.message.Message) -> dns.message.Message | None:
        for server in resolver.servers(self._resolv_conf):
            with contextlib.suppress(dns.exception.DNSException, OSError):
                answer, _ = await dns.asyncquery.udp_with_fallback(query, server, timeout=_ANSWER_S)
                return answer
        return None

    def _remember(self, slot: Slot, name: str) -> None:
        file = self._root / "refused" / str(slot.number)
        names = read_refused(file)
        if name in names or len(names) < _REMEMBERED:
            names[name] = names.get(name, 0) + 1
            new = file.with_name(f".{file.name}.new")
            new.write_text(json.dumps(names))
            new.replace(file)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, names: Names) -> None:
        self._names = names

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
        self._names.datagram(self._transport, data, peer)


def _addresses(answer: dns.message.Message) -> dict[str, int]:
    """Return the addresses of an answer with their lifetimes in seconds, without addresses of links
    or of this host.
    """
    found = {}
    for records in answer.answer:
        if records.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA):
            for record in records:
                address = ip_address(record.to_text())
                if not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified):
                    found[str(address)] = int(records.ttl)
    return found


def _refusal(query: dns.message.Message) -> dns.message.Message:
    answer = dns.message.make_response(query)
    answer.set_rcode(dns.rcode.REFUSED)
    return answer


def _packed(answer: dns.message.Message, question: bytes) -> bytes:
    """Return an answer as a datagram.

    If it is too long, return a truncated one, so that the guest repeats the question by TCP.
    """
    query = dns.message.from_wire(question)
    limit = min(max(512, query.payload if query.edns >= 0 else 512), _LARGEST)
    try:
        return answer.to_wire(max_size=limit)
    except dns.exception.TooBig:
        short = dns.message.make_response(query)
        short.flags |= dns.flags.TC
        return short.to_wire()


def _say_serving(asked: socket.socket) -> None:
    with contextlib.suppress(OSError), asked.accept()[0] as caller:  # it may be gone
        caller.send(SERVING)


def main(root: str, key: str, host: str, resolv_conf: str, lock: str, asked: str) -> None:
    """Run as the filter.

    The caller holds the lock and listens: see `coppice.network.nat.filtering`.
    """
    if host:
        netns.enter(Path(host))
    with socket.socket(fileno=int(asked)) as listener:
        asyncio.run(Names(Path(root), key, Path(resolv_conf)).serve(int(lock), listener))


if __name__ == "__main__":
    main(*sys.argv[1:])
