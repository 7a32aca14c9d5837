"""Files and sockets of a fake guest: the real agent works on them, as a process of this host.

The paths and ports of such a guest are those of the host. So a guest has no files unless a test
names the directory of its files with `files_below`, and then no others; and no ports but those that a
test names with `listening`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from agent_process import agent_binary, running_agent
from coppice.agent.protocol import (
    NONCE_SIZE,
    Fields,
    Frame,
    FrameDecoder,
    FrameType,
    encode_frame,
    encode_hello,
    encode_request,
)
from fakes.wire import Fault

if TYPE_CHECKING:
    from fakes.guest import Stream

_NUMBER = 1  # of the stream, to the agent

_roots: list[Path] = []
_ports: list[int] = []


@contextlib.contextmanager
def files_below(root: Path) -> Iterator[None]:
    """Let fake guests work on files below a directory, for a block."""
    _roots.append(root)
    try:
        yield
    finally:
        _roots.remove(root)


@contextlib.contextmanager
def listening(port: int) -> Iterator[None]:
    """Let fake guests reach a port of this host, for a block."""
    _ports.append(port)
    try:
        yield
    finally:
        _ports.remove(port)


def _require_inside(frame: Frame) -> None:
    """Refuse a request for any other file or port of this host."""
    fields = Fields(frame.payload)
    connects = frame.type == FrameType.CONNECT
    if connects and (port := fields.integer(1, 0)):
        if port not in _ports:
            raise Fault(errno.ECONNREFUSED, f"port {port}: Connection refused")
        return
    path = os.path.normpath(fields.text(2 if connects else 3 if frame.type == FrameType.FILE_MOVE else 1))
    if not any(path == str(root) or path.startswith(f"{root}/") for root in _roots):
        raise Fault(errno.ENOSYS, "a fake guest has no files")


async def relay(stream: Stream, request: Frame) -> None:
    """Pass on the frames of one stream to an agent of its own, until the stream ends or the host
    hangs up.
    """
    _require_inside(request)
    await asyncio.to_thread(agent_binary, "static")  # the first call compiles it
    async with running_agent() as agent:
        agent.killed = True  # the end of the connection may cut it off
        reader, writer = await asyncio.open_unix_connection(sock=agent.sock)
        nonce = secrets.token_bytes(NONCE_SIZE)
        decoder = FrameDecoder(nonce)
        writer.write(encode_hello(nonce) + encode_request(FrameType(request.type), _NUMBER, request.payload))
        asking = asyncio.create_task(_ask(stream, writer))
        try:
            while data := await reader.read(1 << 16):
                for frame in decoder.feed(data):
                    if frame.type != FrameType.HELLO_ACK:
                        await stream.pass_on(frame)
                    if frame.type in (FrameType.OK, FrameType.ERROR):
                        return
        finally:
            asking.cancel()
            writer.transport.abort()
            await asyncio.gather(asking, return_exceptions=True)


async def _ask(stream: Stream, writer: asyncio.StreamWriter) -> None:
    """Pass on the host's later frames."""
    while (frame := await stream.frames.get()) is not None:
        writer.write(encode_frame(FrameType(frame.type), _NUMBER, frame.payload))
        await writer.drain()
    writer.transport.abort()
