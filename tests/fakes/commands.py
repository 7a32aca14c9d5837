"""Commands of a fake guest: the real agent runs them, as processes of this host.

Those whose program is an absolute path. They end with the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING

from agent_process import agent_binary, running_agent
from coppice.agent.protocol import (
    NONCE_SIZE,
    Frame,
    FrameDecoder,
    FrameType,
    encode_fields,
    encode_frame,
    encode_hello,
    encode_request,
)

if TYPE_CHECKING:
    from fakes.guest import Stream

_LAST = (FrameType.OK, FrameType.ERROR, FrameType.EXIT)


class Commands:
    """The commands of one guest. Its agent starts with the first one."""

    def __init__(self) -> None:
        self._starting = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()
        self._writer: asyncio.StreamWriter | None = None
        self._streams: dict[int, tuple[Stream, asyncio.Event]] = {}
        self._number = 0

    async def relay(self, stream: Stream, request: Frame) -> None:
        """Pass on the frames of one stream until it ends, or the host hangs up."""
        writer = await self._agent()
        self._number += 1
        number, over = self._number, asyncio.Event()
        self._streams[number] = stream, over
        payload = request.payload
        if request.type == FrameType.EXEC:  # a login shell must not read the profile of who runs the tests
            payload += encode_fields([(2, "HOME=/nonexistent")])
        writer.write(encode_request(FrameType(request.type), number, payload))
        asking = asyncio.create_task(self._ask(stream, writer, number))
        try:
            await over.wait()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask(self, stream: Stream, writer: asyncio.StreamWriter, number: int) -> None:
        """Pass on the host's later frames. A command goes on when the host hangs up."""
        while (frame := await stream.frames.get()) is not None:
            writer.write(encode_frame(FrameType(frame.type), number, frame.payload))
            await writer.drain()
        writer.write(encode_frame(FrameType.LEAVE, number))

    def forget(self, frame: Frame) -> None:
        """Pass on a FORGET, which follows each command, also those that the fake guest plays itself."""
        if self._writer is not None:
            self._writer.write(encode_frame(FrameType.FORGET, 0, frame.payload))

    async def _agent(self) -> asyncio.StreamWriter:
        async with self._starting:
            if self._writer is None:
                await asyncio.to_thread(agent_binary, "static")  # the first call compiles it
                agent = await self._stack.enter_async_context(running_agent())
                agent.killed = True  # its end is not this test's subject
                reader, self._writer = await asyncio.open_unix_connection(sock=agent.sock)
                nonce = secrets.token_bytes(NONCE_SIZE)
                self._writer.write(encode_hello(nonce))
                reading = asyncio.create_task(self._read(reader, FrameDecoder(nonce)))
                self._stack.callback(reading.cancel)
                self._stack.callback(self._writer.transport.abort)
            return self._writer

    async def _read(self, reader: asyncio.StreamReader, decoder: FrameDecoder) -> None:
        while data := await reader.read(1 << 16):
            for frame in decoder.feed(data):
                if found := self._streams.get(frame.stream):
                    stream, over = found
                    with contextlib.suppress(ConnectionError):  # the host hung up
                        await stream.pass_on(frame)
                    if frame.type in _LAST:
                        del self._streams[frame.stream]
                        over.set()

    async def close(self) -> None:
        """End the agent, which ends its commands. Idempotent."""
        await self._stack.aclose()
