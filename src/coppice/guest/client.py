"""The agent ports of one instance, as any host process may use them.

A port serves one host at a time. Whoever uses it holds `portN.lock` in the instance's directory, by flock: the kernel frees the locks of a
killed process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final

from coppice.errors import Busy, VmmDied
from coppice.guest.channel import Channel
from coppice.guest.control import Control, Health, Identity, Mount
from coppice.guest.copy import copy_in, copy_out
from coppice.guest.process import ExecSession, Exit
from coppice.guest.session import Session, Unpacked
from coppice.store import locks

__all__ = [
    "AgentPorts",
    "Control",
    "ExecSession",
    "Exit",
    "Health",
    "Identity",
    "Mount",
    "Session",
    "Unpacked",
    "copy_in",
    "copy_out",
    "unix_ports",
    "vsock_ports",
]

CONTROL_PORT: Final = 0
SESSION_PORTS: Final = range(1, 8)
VSOCK_BASE: Final = 1024  # where the agent listens for port 0, if the VMM has vsock and no virtio-serial
DEADLINE_S: Final = 30.0  # for a port to be free
PATIENCE_S: Final = 60.0  # for each wait within a session

PortConnector = Callable[[int, int], Awaitable[socket.socket]]
"""Connects to a port by its number, given an open descriptor of the instance's directory. Raises BlockingIOError, ConnectionError,
TimeoutError or FileNotFoundError where it is not there yet."""

_NOT_YET = (BlockingIOError, ConnectionError, TimeoutError, FileNotFoundError)


async def unix_ports(directory: int, port: int) -> socket.socket:
    """The ports of a VMM with virtio-serial: a socket each."""
    return _connect(directory, f"port{port}.sock")


def vsock_ports(name: str = "vsock.sock") -> PortConnector:
    """The ports of a VMM with a vsock device on the unix socket `name` (Firecracker's way: a CONNECT line first)."""

    async def connect(directory: int, port: int) -> socket.socket:
        connected = _connect(directory, name)
        try:
            async with asyncio.timeout(1.0):
                await _ask_for(connected, VSOCK_BASE + port)
        except BaseException:
            connected.close()
            raise
        return connected

    return connect


async def _ask_for(connected: socket.socket, port: int) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connected, f"CONNECT {port}\n".encode())
    answer = b""
    while not answer.endswith(b"\n") and len(answer) < 32:
        byte = await loop.sock_recv(connected, 1)  # no more than the line: what follows is the guest's
        if not byte:
            raise ConnectionRefusedError("nobody listens in the guest")
        answer += byte
    if not answer.startswith(b"OK "):
        raise ConnectionRefusedError("the VMM refused the connection")


def _connect(directory: int, name: str) -> socket.socket:
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        # By the descriptor: the path of the directory may be longer than the 108 bytes of an address.
        connecting.connect(f"/proc/self/fd/{directory}/{name}")
    except BaseException:
        connecting.close()
        raise
    return connecting


class AgentPorts:
    """The ports of the instance in `directory`.

    :param connect: how its VMM offers them
    """

    def __init__(self, directory: Path, *, connect: PortConnector = unix_ports) -> None:
        self._directory = directory
        self._connect = connect

    @contextlib.asynccontextmanager
    async def control(self, deadline_s: float, *, sock: socket.socket | None = None) -> AsyncIterator[Control]:
        """The control port; the first request goes out with the handshake, without a round trip for it.

        :param deadline_s: for the port to be free, and then for each answer
        :param sock: a connection to it that was made before
        :raises Busy: another process talks to it all the time
        :raises VmmDied: there is no machine
        """
        async with self._channel((CONTROL_PORT,), deadline_s, deadline_s, sock) as channel:
            yield Control(channel)

    @contextlib.asynccontextmanager
    async def session(
        self, deadline_s: float = DEADLINE_S, *, patience_s: float = PATIENCE_S, sock: socket.socket | None = None
    ) -> AsyncIterator[Session]:
        """The first free session port.

        :param deadline_s: for a port to be free
        :param patience_s: for each single wait for the guest
        :param sock: a connection to a session port that was made before: then no lock is taken
        :raises Busy: all are in use
        :raises VmmDied: there is no machine
        """
        async with self._channel(SESSION_PORTS, deadline_s, patience_s, sock) as channel:
            yield Session(channel)

    def sessions_open(self) -> tuple[int, ...]:
        """The session ports that somebody holds at this moment."""
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return tuple(port for port in SESSION_PORTS if not _is_free(directory, port))
        finally:
            os.close(directory)

    async def hang_up(self, ports: Iterable[int], deadline_s: float) -> None:
        """Connect to each port and hang up again.

        A port of QEMU that was captured in the middle of a write is restored with its output held back, and nothing but a hang-up
        makes it drop what it holds (virtio_serial_close in QEMU's hw/char/virtio-serial-bus.c).

        No lock is waited for: nobody has a session with a machine that has just been restored. Who holds one had it with the VMM before, and may not
        notice for long that it is gone: a command whose output nobody takes does not read.

        :raises VmmDied: there is no machine
        """
        for port in ports:
            async with contextlib.AsyncExitStack() as stack:
                (await self._acquire(stack, (port,), deadline_s, locked=False)).close()

    @contextlib.asynccontextmanager
    async def _channel(
        self, ports: Iterable[int], deadline_s: float, patience_s: float, sock: socket.socket | None
    ) -> AsyncIterator[Channel]:
        async with contextlib.AsyncExitStack() as stack:
            if sock is None:
                sock = await self._acquire(stack, tuple(ports), deadline_s)
            channel = await Channel.over(sock, patience_s)
            stack.push_async_callback(channel.close)
            yield channel

    async def _acquire(
        self, stack: contextlib.AsyncExitStack, ports: tuple[int, ...], deadline_s: float, *, locked: bool = True
    ) -> socket.socket:
        """Lock one of the ports and connect to it; the stack gives the lock back. Without `locked` it is the first, whoever holds it."""
        try:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise _no_directory() from error
        stack.callback(os.close, directory)
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        pause = 0.001
        held: int | None = None if locked else ports[0]
        while True:
            if held is None:
                try:
                    held = _lock_first(directory, ports, stack)
                except FileNotFoundError as error:  # it was removed under us
                    raise _no_directory() from error
            if held is not None:
                with contextlib.suppress(*_NOT_YET):
                    return await self._connect(directory, held)
            if loop.time() >= end:
                raise _not_acquired(held, deadline_s)
            # Neither flock nor a socket that is not there yet has an event to wait for with a deadline.
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  (jitter against lock-step, not a secret)
            pause = min(pause * 1.5, 0.05)


def _is_free(directory: int, port: int) -> bool:
    with contextlib.ExitStack() as stack:
        lock = os.open(f"port{port}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
        stack.callback(os.close, lock)
        return locks.take(lock)


def _lock_first(directory: int, ports: tuple[int, ...], stack: contextlib.AsyncExitStack) -> int | None:
    for port in ports:
        lock = os.open(f"port{port}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
        locks.keep(lock)
        try:
            taken = locks.take(lock)
        except BaseException:
            locks.release(lock)
            raise
        if taken:
            stack.callback(locks.release, lock)
            return port
        locks.release(lock)
    return None


def _no_directory() -> VmmDied:
    return VmmDied("the instance's directory is gone", hint="`coppice ls` shows those there are")


def _not_acquired(held: int | None, deadline_s: float) -> Busy | VmmDied:
    if held is None:
        return Busy(
            f"all agent ports of the machine were in use for {deadline_s:g} s",
            hint="wait until another command has ended, then try again",
        )
    return VmmDied(
        f"the machine offers no agent port after {deadline_s:g} s",
        hint="see `coppice inspect NAME` and `coppice logs --vmm NAME`, then start it again",
    )
