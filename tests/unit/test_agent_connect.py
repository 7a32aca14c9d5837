"""CONNECT: bytes to a port or a unix socket of the guest, with an end for each direction."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_process import BUILDS, running_agent
from coppice.agent.channel import Channel
from coppice.agent.connection import connect
from coppice.agent.protocol import CREDIT_SIZE, FrameType, encode_fields
from coppice.errors import GuestRefused


async def _reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer at the end of the input, which only a half-closed connection can show."""
    data = await reader.read()
    writer.write(data[::-1])
    await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def channel_to(build: str) -> AsyncIterator[Channel]:
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        yield channel
        await channel.close()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", ["port", "path"])
async def test_both_directions_and_their_ends(build: str, kind: str, tmp_path: Path) -> None:
    """A megabyte goes to a server that answers when its input has ended, and comes back."""
    path = str(tmp_path / "server.sock")
    server = (
        await asyncio.start_unix_server(_reverse, path)
        if kind == "path"
        else await asyncio.start_server(_reverse, "127.0.0.1", 0)
    )
    number = 0 if kind == "path" else int(server.sockets[0].getsockname()[1])
    data = bytes(range(256)) * 4096
    async with server, channel_to(build) as channel:
        stream = await channel.open(FrameType.CONNECT, encode_fields([(2, path) if kind == "path" else (1, number)]))
        assert (await stream.receive()).type == FrameType.STARTED
        await stream.send_data(FrameType.DATA, data)
        await stream.send(FrameType.DATA_EOF)
        got = bytearray()
        while (frame := await stream.receive()).type == FrameType.DATA:
            got += frame.payload
        assert frame.type == FrameType.DATA_EOF
        assert bytes(got) == data[::-1]
        stream.final(await stream.receive())


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("size", [0, 1 << 20])
async def test_a_reset_is_no_end(build: str, size: int) -> None:
    """A server that breaks the connection has not ended its data, whichever direction notices it first.

    If its data fills the window, the agent does not read, and a write notices it.
    """
    aborted = asyncio.Event()

    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(size))
        await reader.readexactly(1)
        server_end = writer.get_extra_info("socket")
        server_end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        aborted.set()

    server = await asyncio.start_server(broken, "127.0.0.1", 0)
    async with server, channel_to(build) as channel:
        fields = encode_fields([(1, int(server.sockets[0].getsockname()[1]))])
        stream = await channel.open(FrameType.CONNECT, fields)
        assert (await stream.receive()).type == FrameType.STARTED
        async with asyncio.timeout(30):
            while sum(len(frame.payload) for frame in stream._frames) < min(size, CREDIT_SIZE):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # no event tells that the window is full
        await stream.send_data(FrameType.DATA, b"x")
        await aborted.wait()
        await asyncio.sleep(0)  # the transport closes its socket now
        await stream.send_data(FrameType.DATA, b"more")
        while (frame := await stream.receive()).type == FrameType.DATA:
            pass
        with pytest.raises(GuestRefused, match="reset"):
            stream.final(frame)


@pytest.mark.parametrize("build", BUILDS)
async def test_the_end_of_a_connection_waits_for_its_bytes(build: str, tmp_path: Path) -> None:
    """A client that leaves while the agent still has its bytes, because the server does not read, loses none."""
    loop = asyncio.get_running_loop()
    leaving = asyncio.Event()
    piece = bytes(4096)
    sent = 0

    async def late(listener: socket.socket) -> int:
        sock, _ = await loop.sock_accept(listener)
        with sock:
            await leaving.wait()
            return sum([len(data) async for data in _all(sock)])

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.setblocking(False)
        serving = asyncio.create_task(late(listener))
        async with channel_to(build) as channel:
            async with connect(channel, f"unix:{tmp_path}/s") as connection:
                low = 0  # how often there was no credit for another piece after an answer of the agent
                while low < 2:
                    if connection._stream.window >= len(piece):
                        await connection.send(piece)
                        sent, low = sent + len(piece), 0
                    else:
                        await channel.call(FrameType.FILE_STAT, encode_fields([(1, "/")]))
                        low += 1
                leaving.set()
            assert await asyncio.wait_for(serving, 30) == sent


@pytest.mark.parametrize("build", BUILDS)
async def test_a_full_queue_is_waited_for(build: str, tmp_path: Path) -> None:
    """A unix socket whose server is slow to accept refuses for the moment only."""

    async def reach(channel: Channel) -> None:
        async with connect(channel, f"unix:{tmp_path}/s"):
            pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        listener.setblocking(False)
        async with channel_to(build) as channel, connect(channel, f"unix:{tmp_path}/s"):
            waiting = asyncio.create_task(reach(channel))
            for _ in range(3):
                await channel.call(FrameType.FILE_STAT, encode_fields([(1, "/")]))
            assert not waiting.done()
            accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
            await asyncio.wait_for(waiting, 30)
            accepted.close()


async def _all(sock: socket.socket) -> AsyncIterator[bytes]:
    while data := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
        yield data


@pytest.mark.parametrize("build", BUILDS)
async def test_nothing_listens(build: str, tmp_path: Path) -> None:
    """The error is that of the guest's kernel."""
    async with channel_to(build) as channel:
        with pytest.raises(GuestRefused, match="Connection refused"):
            await channel.call(FrameType.CONNECT, encode_fields([(1, 1)]))
        with pytest.raises(GuestRefused, match="No such file"):
            await channel.call(FrameType.CONNECT, encode_fields([(2, str(tmp_path / "none"))]))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("end", ["accepted", "refused"])
async def test_a_connection_that_the_kernel_delays(build: str, end: str) -> None:
    """It is open when the server's kernel has taken it, and not before: until then it may be refused.

    The kernel drops connections to a full queue; the client's repeats its own a second later.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        port = listener.getsockname()[1]
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))  # fills the queue
        async with channel_to(build) as channel:
            stream = await channel.open(FrameType.CONNECT, encode_fields([(1, port)]))
            await stream.send_data(FrameType.DATA, b"early")
            await stream.send(FrameType.DATA_EOF)
            await channel.call(FrameType.FILE_STAT, encode_fields([(1, "/")]))
            assert not stream._frames
            listener.setblocking(False)
            if end == "refused":
                listener.close()
                with pytest.raises(GuestRefused, match="refused"):
                    stream.final(await stream.receive())
                return
            loop = asyncio.get_running_loop()
            stack.enter_context((await loop.sock_accept(listener))[0])
            accepted = stack.enter_context((await loop.sock_accept(listener))[0])
            assert (await stream.receive()).type == FrameType.STARTED
            assert [await loop.sock_recv(accepted, 100) for _ in range(2)] == [b"early", b""]
