"""The agent ports of one instance. Any host process may use them.

A port serves one host process at a time, for any number of sessions. That process holds an flock on
`portN.lock` in the instance's directory. The kernel releases the lock if the process is killed.
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

from coppice.agent.channel import Channel
from coppice.agent.control import Acknowledged, Control, Identity, Mount
from coppice.agent.pool import Pool
from coppice.agent.process import ExecSession
from coppice.agent.session import Session
from coppice.errors import Busy, GuestTimeout, HostCannot, VmmDied
from coppice.state import locks

__all__ = [
    "Acknowledged",
    "AgentPorts",
    "Control",
    "ExecSession",
    "Identity",
    "Mount",
    "Session",
]

CONTROL_PORT: Final = 0
SESSION_PORTS: Final = range(1, 8)
DEADLINE_S: Final = 30.0  # until a port is free
PATIENCE_S: Final = 60.0  # for each wait within a session

_LOST_S: Final = (3.0, 9.0)  # the patience with connections that may be lost

Dial = Callable[[int], Awaitable[socket.socket]]
"""Connects to a port by its number. Raises one of `_NOT_YET` if nothing listens yet."""

_NOT_YET = (BlockingIOError, ConnectionError, TimeoutError, FileNotFoundError)


class AgentPorts:
    """The ports of the instance in `directory`.

    :param dial: connects to a port of the instance's VMM
    :param pool: shares one connection among the sessions of this process
    :param vmm: identifies the VMM process, so that no connection to another one is used
    :param is_paused: whether the machine is paused; a silent guest that is paused is waited for
    """

    def __init__(
        self,
        directory: Path,
        dial: Dial,
        *,
        pool: Pool | None = None,
        vmm: object = None,
        is_paused: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._directory = directory
        self._dial = dial
        self._pool = pool
        self._key = (directory, vmm)
        self._is_paused = is_paused

    @contextlib.asynccontextmanager
    async def control(self, deadline_s: float) -> AsyncIterator[Control]:
        """Open the control port. The first request goes out together with the handshake.

        :param deadline_s: the limit until the port is free, and then of each answer
        :raises Busy: another process held the port until the deadline
        :raises VmmDied: no machine answers
        :raises GuestTimeout: the machine does not take the connection
        """
        async with self._channel((CONTROL_PORT,), deadline_s, deadline_s) as channel:
            yield Control(channel)

    async def identify(
        self, identity: Callable[[], Identity], deadline_s: float, *, runs: bool = False, may_lose: bool = False
    ) -> Acknowledged:
        """Give the machine its identity.

        :param identity: makes the message, which has the time
        :param runs: the guest runs already. Otherwise it may not read for seconds, so that the time would have to be
            sent again: the message is made when the agent has answered the handshake
        :param may_lose: the connection may break or stay silent (`VmmDriver.loses_connections`).
            Then ask over a new one whether the guest has taken its identity, and send it again if
            the guest has not read it
        :raises Busy: another process held the port until the deadline
        :raises VmmDied: no machine answers, or the connection broke
        :raises GuestTimeout: no answer came in time
        :raises GuestRefused: a step failed; the machine must not be used
        """
        for number, patience_s in enumerate(_LOST_S if may_lose else ()):
            with contextlib.suppress(Busy, VmmDied, GuestTimeout):
                return await self._identify(identity, min(patience_s, deadline_s), runs=runs, again=number > 0)
        return await self._identify(identity, deadline_s, runs=runs, again=may_lose)

    async def _identify(
        self, identity: Callable[[], Identity], deadline_s: float, *, runs: bool, again: bool
    ) -> Acknowledged:
        async with self.control(deadline_s) as control:
            if not runs:
                await control.greet()
            if again and (taken := await control.acknowledged(identity().serial)):
                return taken
            return await control.identity(identity())

    @contextlib.asynccontextmanager
    async def session(
        self, deadline_s: float = DEADLINE_S, *, patience_s: float = PATIENCE_S
    ) -> AsyncIterator[Session]:
        """Open a session, over the connection of this process or over the first free session port.

        :param deadline_s: the limit until a port is free
        :param patience_s: the limit of each single wait for the guest
        :raises Busy: all ports were in use until the deadline
        :raises VmmDied: no machine answers
        """
        connection = self._channel(SESSION_PORTS, deadline_s, patience_s)
        if self._pool is not None:
            connection = self._pool.use(self._key, connection)
        async with connection as channel:
            yield Session(channel)

    async def close_idle(self) -> None:
        """Close the connection of this process if no session uses it."""
        if self._pool is not None:
            await self._pool.close_idle(self._key)

    def sessions_open(self) -> tuple[int, ...]:
        """Return the session ports whose lock is held at this moment."""
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return tuple(port for port in SESSION_PORTS if not _is_free(directory, port))
        finally:
            os.close(directory)

    async def hang_up(self, ports: Iterable[int], deadline_s: float) -> None:
        """Connect to each port and hang up again.

        If a port was captured in the middle of a write, QEMU restores it with its output held back.
        Only a hang-up makes QEMU drop that output (virtio_serial_close in its
        hw/char/virtio-serial-bus.c).

        Takes no lock: a machine that has just been restored has no sessions. A lock that is still
        held belongs to a session with the previous VMM, which may take long to notice its end.

        :raises VmmDied: no machine answers
        """
        for port in ports:
            async with contextlib.AsyncExitStack() as stack:
                (await self._acquire(stack, (port,), deadline_s, locked=False)).close()

    @contextlib.asynccontextmanager
    async def _channel(self, ports: Iterable[int], deadline_s: float, patience_s: float) -> AsyncIterator[Channel]:
        async with contextlib.AsyncExitStack() as stack:
            sock = await self._acquire(stack, tuple(ports), deadline_s)
            channel = await Channel.over(sock, patience_s, self._is_paused)
            stack.push_async_callback(channel.close)
            yield channel

    async def _acquire(
        self, stack: contextlib.AsyncExitStack, ports: tuple[int, ...], deadline_s: float, *, locked: bool = True
    ) -> socket.socket:
        """Lock one of the ports and connect to it; `stack` releases the lock.

        Without `locked`, connect to the first port and take no lock.
        """
        try:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise _no_directory() from error
        try:
            return await self._acquire_in(directory, stack, ports, deadline_s, locked=locked)
        finally:
            os.close(directory)

    async def _acquire_in(
        self,
        directory: int,
        stack: contextlib.AsyncExitStack,
        ports: tuple[int, ...],
        deadline_s: float,
        *,
        locked: bool,
    ) -> socket.socket:
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        pause = 0.001
        held: int | None = None if locked else ports[0]
        silent = False
        while True:
            if held is None:
                try:
                    held = _lock_first(directory, ports, stack)
                except FileNotFoundError as error:  # the directory was removed meanwhile
                    raise _no_directory() from error
            if held is not None:
                try:
                    async with asyncio.timeout_at(end):
                        return await self._dial(held)
                except _NOT_YET as error:
                    silent = isinstance(error, TimeoutError)
                except OSError as error:  # a problem of this host: too many open files, no permission
                    raise HostCannot(
                        f"Cannot connect to agent port {held}: {error.strerror or error}",
                        hint="see the limits of this user with `ulimit -a`",
                    ) from error
            if loop.time() >= end:
                raise _not_acquired(held, deadline_s, silent=silent)
            # Neither a free flock nor a new socket has an event that can be awaited with a
            # deadline.
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
            pause = min(pause * 1.5, 0.05)


def _open_lock(directory: int, port: int) -> int:
    return os.open(f"port{port}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)


def _is_free(directory: int, port: int) -> bool:
    lock = _open_lock(directory, port)
    try:
        return locks.take(lock)
    finally:
        os.close(lock)


def _lock_first(directory: int, ports: tuple[int, ...], stack: contextlib.AsyncExitStack) -> int | None:
    """Lock the first free port and return its number, or None if all are held."""
    for port in ports:
        lock = _open_lock(directory, port)
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
    return VmmDied("the instance's directory was removed", hint="list the instances with `coppice ls`")


def _not_acquired(held: int | None, deadline_s: float, *, silent: bool) -> Busy | GuestTimeout | VmmDied:
    if held is None:
        return Busy(
            f"all agent ports of the machine were in use for {deadline_s:g} s",
            hint="wait until another command has ended, then try again",
        )
    if silent:  # there is a machine, and its guest does not take the connection
        return GuestTimeout(
            f"the guest did not answer within {deadline_s:g} s (agent port {held})",
            hint="see its console with `coppice logs NAME`",
        )
    return VmmDied(
        f"the machine offered no agent port within {deadline_s:g} s",
        hint="see `coppice inspect NAME` and `coppice logs --vmm NAME`, then start it again",
    )
