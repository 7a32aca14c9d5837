"""A VMM's Unix sockets, in a directory whose path may exceed the 108 bytes of an address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from coppice.linux.files import untranslated

_VSOCK_BASE: Final = 1024  # the vsock port of agent port 0, for a VMM without virtio-serial
_ANSWER_S: Final = 1.0
_ANSWER_MOST: Final = 32


def connect(directory: Path, name: str) -> socket.socket:
    """Connect to a socket in the directory; return a non-blocking socket.

    A symbolic link is not followed: a VMM that can make sockets could lead to those of others.

    :raises OSError: nothing listens on it
    """
    descriptor = os.open(f"{directory}/{name}", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            connecting.connect(f"/proc/self/fd/{descriptor}")
        except BaseException:
            connecting.close()
            raise
    finally:
        os.close(descriptor)
    return connecting


async def connect_vsock(directory: Path, name: str, port: int) -> socket.socket:
    """Connect to an agent port over a vsock device. Its host end is a unix socket that expects a
    CONNECT line.

    :raises OSError: nothing listens on the socket, or nothing in the guest
    """
    connected = connect(directory, name)
    try:
        async with asyncio.timeout(_ANSWER_S):
            await _ask_for(connected, _VSOCK_BASE + port)
    except BaseException:
        connected.close()
        raise
    return connected


async def _ask_for(connected: socket.socket, port: int) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connected, f"CONNECT {port}\n".encode())
    answer = b""
    while not answer.endswith(b"\n") and len(answer) < _ANSWER_MOST:
        byte = await loop.sock_recv(connected, 1)  # only the line: the bytes after it are the guest's
        if not byte:
            raise ConnectionRefusedError(f"nothing listens on vsock port {port} in the guest")
        answer += byte
    if not answer.startswith(b"OK "):
        raise ConnectionRefusedError(f"the VMM refused a connection to vsock port {port}")


@contextlib.contextmanager
def listening(directory: Path, names: Sequence[str]) -> Iterator[dict[str, socket.socket]]:
    """Listen on sockets in the directory, replacing stale ones. They are closed when the block
    ends.

    :raises NoSpace: the disk is full
    :raises HostCannot: a socket cannot be made
    """
    sockets: dict[str, socket.socket] = {}
    with untranslated(f"listen in {directory}"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with untranslated(f"listen in {directory}"):
            for name in {*names}.intersection(os.listdir(descriptor)):  # noqa: PTH208 - a descriptor
                os.unlink(name, dir_fd=descriptor)
            for name in names:
                sockets[name] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sockets[name].bind(f"/proc/self/fd/{descriptor}/{name}")
                sockets[name].listen(1)
        yield sockets
    finally:
        for listener in sockets.values():
            listener.close()
        os.close(descriptor)
