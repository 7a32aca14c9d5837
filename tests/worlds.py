"""Network namespaces that stand for this host and for the world outside, so that no test touches
the real ones.

guest -- [slot] -- host (203.0.113.1, 2001:db8::1) -- world (203.0.113.2, 2001:db8::2)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute

from coppice.linux import netns, tap
from coppice.model.network import GuestNetwork, Nic
from remains import end, in_network

T = TypeVar("T")
HOST4, WORLD4 = "203.0.113.1", "203.0.113.2"
HOST6, WORLD6 = "2001:db8::1", "2001:db8::2"
WAIT_S = 5.0
REFUSED_S = 1.5


class Namespace:
    """One network namespace of a test."""

    def __init__(self, name: str) -> None:
        self.path = netns.RUNTIME / f"cptest-{os.getpid()}-{secrets.token_hex(3)}-{name}"
        self._stack = contextlib.ExitStack()
        netns.create(self.path, _loopback_up)

    def run(self, work: Callable[[], T]) -> T:
        """Run `work` in the namespace."""
        return netns.apart(self.path, work)

    def close(self) -> None:
        """End the namespace's servers and all processes in it, which a failed test left, and remove it."""
        self._stack.close()
        end(in_network(self.path))
        netns.remove(self.path)

    def serve(self, address: str, port: int) -> int:
        """Answer each TCP connection and UDP datagram to an address with the peer's address; return
        the port.
        """

        def listen() -> tuple[socket.socket, socket.socket]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            server = socket.create_server((address, port), family=family)
            datagrams = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            datagrams.bind(server.getsockname()[:2])
            return server, datagrams

        server, datagrams = self.run(listen)
        over = threading.Event()
        thread = threading.Thread(target=_answer, args=(server, datagrams, over))
        thread.start()

        def end() -> None:
            over.set()
            thread.join()
            server.close()
            datagrams.close()

        self._stack.callback(end)
        return int(server.getsockname()[1])

    def ask(self, address: str, port: int, *, kind: int = socket.SOCK_STREAM, wait_s: float = WAIT_S) -> str:
        """Return a server's answer to a client in this namespace.

        :raises OSError: there was no answer
        """

        def connect() -> str:
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as asking:
                asking.settimeout(wait_s)
                asking.connect((address, port))
                if kind == socket.SOCK_DGRAM:
                    asking.send(b"?")
                return asking.recv(100).decode()

        return self.run(connect)

    def reaches(self, address: str, port: int, *, kind: int = socket.SOCK_STREAM) -> bool:
        """Return whether a client in this namespace gets an answer."""
        try:
            return bool(self.ask(address, port, kind=kind, wait_s=REFUSED_S))
        except OSError:
            return False

    def left(self, prefix: str) -> list[str]:
        """Return the links whose names have this prefix."""
        return self.run(lambda: [name for _, name in socket.if_nameindex() if name.startswith(prefix)])


def _loopback_up() -> None:
    with IPRoute() as kernel:
        kernel.link("set", index=1, state="up")


def _answer(server: socket.socket, datagrams: socket.socket, over: threading.Event) -> None:
    while not over.is_set():
        ready, _, _ = select.select([server, datagrams], [], [], 0.05)
        if server in ready:
            with server.accept()[0] as connection:
                connection.sendall(str(connection.getpeername()[0]).encode())
        if datagrams in ready:
            _, peer = datagrams.recvfrom(100)
            datagrams.sendto(str(peer[0]).encode(), peer)


class World:
    """A host and the world outside it."""

    def __init__(self) -> None:
        self.host = Namespace("host")
        self.world = Namespace("world")
        descriptor = os.open(self.world.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.host.run(lambda: _connect_host(descriptor))
        finally:
            os.close(descriptor)
        self.world.run(_connect_world)

    def close(self) -> None:
        """Remove both namespaces."""
        self.host.close()
        self.world.close()


def _connect_host(world: int) -> None:
    with IPRoute() as kernel:
        kernel.link(
            "add", ifname="up0", kind="veth", mtu=1400, peer={"ifname": "eth0", "mtu": 1400, "net_ns_fd": world}
        )
        _address(kernel, "up0", HOST4, HOST6)
        kernel.route("add", dst="default", gateway=WORLD4)
        kernel.route("add", family=socket.AF_INET6, dst="default", gateway=WORLD6)


def _connect_world() -> None:
    with IPRoute() as kernel:
        _address(kernel, "eth0", WORLD4, WORLD6)


def _address(kernel: IPRoute, name: str, address4: str, address6: str) -> None:
    Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text("0")
    (link,) = kernel.link_lookup(ifname=name)
    kernel.link("set", index=link, state="up")
    kernel.addr("add", index=link, address=address4, prefixlen=24)
    kernel.addr("add", index=link, address=address6, prefixlen=64)


class Guest(Namespace):
    """A guest as its slot sees it: a card with the given MAC and addresses, in a namespace instead
    of a machine.
    """

    def __init__(self, nic: Nic, network: GuestNetwork) -> None:
        super().__init__("guest")
        self.run(lambda: _card(nic, network))
        ends = tap.open_in(self.path, "card"), tap.open_in(Path(nic.namespace), nic.tap)
        over, ended = os.pipe()
        thread = threading.Thread(target=_carry, args=(*ends, over))
        thread.start()

        def unplug() -> None:
            os.close(ended)
            thread.join()
            for descriptor in (*ends, over):
                os.close(descriptor)

        self._stack.callback(unplug)


def _card(nic: Nic, network: GuestNetwork) -> None:
    tap.create("card")
    Path("/proc/sys/net/ipv6/conf/card/accept_dad").write_text("0")
    with IPRoute() as kernel:
        (link,) = kernel.link_lookup(ifname="card")
        kernel.link("set", index=link, address=nic.mac, mtu=network.mtu or 1500, state="up")
        address, _, prefix = network.address.partition("/")
        kernel.addr("add", index=link, address=address, prefixlen=int(prefix))
        kernel.route("add", dst="default", gateway=network.gateway)
        if network.address6 and network.gateway6:
            address, _, prefix = network.address6.partition("/")
            kernel.addr("add", index=link, address=address, prefixlen=int(prefix))
            kernel.route("add", family=socket.AF_INET6, dst="default", gateway=network.gateway6)


def _carry(one: int, other: int, over: int) -> None:
    while True:
        ready, _, _ = select.select([one, other, over], [], [])
        if over in ready:
            return
        for source, sink in ((one, other), (other, one)):
            if source in ready:
                with contextlib.suppress(OSError):
                    os.write(sink, os.read(source, 1 << 17))


@contextlib.contextmanager
def guest(nic: Nic, network: GuestNetwork) -> Iterator[Guest]:
    """Provide a guest for the length of a block."""
    found = Guest(nic, network)
    try:
        yield found
    finally:
        found.close()
