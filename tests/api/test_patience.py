"""A client that pauses keeps its connection; one whose server is gone is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, unix_serve

from conftest import HostFactory
from coppice.client.connecting import connect_async
from coppice.client.remote import streams
from coppice.client.remote.address import parse_address
from coppice.client.remote.streams import next_frame, opened
from coppice.errors import HostCannot
from coppice.server import serving
from fakes.hosting import boot

FRAMES, FRAME = 200, 1 << 10  # more than a client reads ahead, and less than the window of a fake guest's command
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for signs of life all the time."""
    monkeypatch.setattr(serving, "_PING_S", 0.05)
    monkeypatch.setattr(streams, "QUIET_S", 0.05)


async def test_a_reader_that_pauses_loses_nothing(make_host: HostFactory, socket_address: str) -> None:
    """As `coppice exec vm -- command | less` does. Neither end counts the time in which nobody reads."""
    async with asyncio.timeout(DEADLINE_S), make_host() as local, connect_async(socket_address) as host:
        await boot(local)
        async with (await host.get("oak")).open_exec(["cat"]) as session:
            output = aiter(session)
            for _ in range(FRAMES):
                await session.send_stdin(bytes(FRAME))
            await asyncio.sleep(2)  # dozens of pings that nobody answers
            found = 0
            while found < FRAMES * FRAME:
                found += len((await anext(output))[1])
            await session.eof()
            assert [data async for _, data in output] == []


async def test_a_server_that_gives_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is told, in bounded time, and after what it has already got."""
    monkeypatch.setattr(streams, "PATIENCE_S", 0.2)
    ending = asyncio.Event()

    async def fall_silent(connection: ServerConnection) -> None:
        await connection.send(b"\x01last words")
        connection.transport.pause_reading()
        await ending.wait()
        connection.transport.resume_reading()

    path = tmp_path / "server.sock"
    async with asyncio.timeout(DEADLINE_S):
        server = await unix_serve(fall_silent, str(path))
        async with opened(parse_address(f"unix:{path}"), {}, "/stream", msgspec.Struct()) as connection:
            assert await next_frame(connection) == b"\x01last words"
            with pytest.raises(HostCannot, match="connection to the server was lost"):
                await next_frame(connection)
        ending.set()
        server.close()
        await server.wait_closed()


async def test_input_of_any_size(make_host: HostFactory, socket_address: str) -> None:
    """One call may send more than the largest frame."""
    async with asyncio.timeout(DEADLINE_S), make_host() as local, connect_async(socket_address) as host:
        await boot(local)
        async with (await host.get("oak")).open_exec(["cat"]) as session:
            feeding = asyncio.create_task(session.send_stdin(bytes(3 << 20)))
            found = 0
            async for _, data in session:
                found += len(data)
                if found == 3 << 20:
                    await feeding
                    await session.eof()
            assert found == 3 << 20
