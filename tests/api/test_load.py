"""Many clients at once: idle ones cost little, and a slow one does not delay the others."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client.connecting import connect_async
from coppice.model import State
from coppice.model.guest import ExecSession
from fakes.hosting import boot, make
from servers import Servers, client_of

IDLE = 1000
SESSIONS_PER_FORK = 7  # of the agent
FORKS = 30
MIB = 1 << 20
DEADLINE_S = 240.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def many_files() -> None:
    """Let this process have as many open files as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def resident(pid: int) -> int:
    """Return the resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture
async def server(servers: Servers, make_host: HostFactory) -> AsyncIterator[tuple[Servers, str]]:
    """A server process with a template, and its address."""
    async with make_host() as local:
        await make(local, State.TEMPLATE, "stump")
        await boot(local)
        yield servers, await servers.start()


async def test_a_thousand_idle_connections_hold(server: tuple[Servers, str]) -> None:
    """Each costs less than 100 KiB, all are still served, and other requests are answered meanwhile."""
    servers, address = server
    path = address.removeprefix("unix:")
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request)
        assert b"200" in await reader.readline()
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))

    async with asyncio.timeout(DEADLINE_S), client_of(address) as client:
        for _ in range(50):
            assert (await client.get("/health")).status_code == 200
        before = resident(servers.pid)
        idle = [await asyncio.open_unix_connection(path) for _ in range(IDLE)]
        try:
            await asyncio.gather(*(ask(*each) for each in idle))
            assert (await client.post("/call/ls", json={})).status_code == 200
            assert resident(servers.pid) - before < IDLE * 100 * 1024
            await asyncio.gather(*(ask(*each) for each in idle))
        finally:
            for _, writer in idle:
                writer.close()


async def test_many_sessions_hold(server: tuple[Servers, str]) -> None:
    """More than 200 commands over 30 forks have their own input and output, in bounded memory."""
    servers, address = server
    async with asyncio.timeout(DEADLINE_S), AsyncExitStack() as stack:
        host = await stack.enter_async_context(connect_async(address))
        forks = list(await (await host.get("stump")).fork(FORKS, names=["elm"]))
        assert len(forks) == FORKS
        before = resident(servers.pid)

        async def begin(number: int) -> tuple[int, ExecSession]:
            return number, await stack.enter_async_context(forks[number % FORKS].open_exec(["cat"]))

        sessions = await asyncio.gather(*(begin(number) for number in range(FORKS * SESSIONS_PER_FORK)))
        for turn in range(3):

            async def talk(number: int, session: ExecSession, turn: int = turn) -> None:
                line = f"{number} {turn}\n".encode()
                await session.send_stdin(line)
                assert await anext(aiter(session)) == ("stdout", line)

            await asyncio.gather(*(talk(*each) for each in sessions))
        assert resident(servers.pid) - before < len(sessions) * MIB // 2


async def test_a_slow_reader_delays_nobody(server: tuple[Servers, str]) -> None:
    """It reads none of a command's endless output. The server keeps little of it, and goes on."""
    servers, address = server
    path = address.removeprefix("unix:")
    async with asyncio.timeout(DEADLINE_S), AsyncExitStack() as stack:
        host = await stack.enter_async_context(connect_async(address))
        before = resident(servers.pid)
        session = await stack.enter_async_context((await host.get("oak")).open_exec(["cat"]))
        feeding = asyncio.create_task(_feed(session))
        _, writer = await asyncio.open_unix_connection(path)
        stack.callback(writer.close)
        writer.write(b"GET /events?after=0 HTTP/1.1\r\nHost: x\r\n\r\n")  # and reads nothing
        async with client_of(address) as client:
            for _ in range(100):
                assert (await client.post("/call/ls", json={})).status_code == 200
                assert (await client.get("/health")).status_code == 200
        assert resident(servers.pid) - before < 64 * MIB
        feeding.cancel()
        await asyncio.wait({feeding})


async def _feed(session: ExecSession) -> None:
    """Send as much input as the server takes."""
    while True:
        await session.send_stdin(bytes(1 << 16))
