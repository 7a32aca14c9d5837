"""Connections to servers in a guest: both directions, their ends, errors, and many at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import random
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from agent_process import agent_binary
from coppice.client import AsyncHost, AsyncMachine
from coppice.errors import CoppiceError, GuestRefused, IllegalTransition, NotFound, UsageError, VmmDied
from coppice.model import MIB, State
from coppice.requests import ConnectRequest
from fakes.hosting import make
from fakes.relay import files_below, listening

DEADLINE_S = 60.0
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


@pytest.fixture(autouse=True)
async def _deadline(tmp_path: Path) -> AsyncIterator[None]:
    """Let fake guests reach the sockets of the test's directory, and bound each test."""
    agent_binary("static")  # the first call compiles it, which can take as long as a deadline
    with files_below(tmp_path):
        async with asyncio.timeout(DEADLINE_S):
            yield


@pytest.fixture
async def vm(fake_host: AsyncHost) -> AsyncMachine:
    """A running machine."""
    return fake_host.machine(await make(fake_host, State.RUNNING))


class Served:
    """A server in the guest, and the ends of its connections."""

    def __init__(self, work: Serve) -> None:
        self._work = work
        self.ended: asyncio.Queue[object] = asyncio.Queue()
        """The result of each connection that has ended."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        result: object = None
        try:
            result = await self._work(reader, writer)
        except OSError as error:
            result = error
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self.ended.put_nowait(result)


@contextlib.asynccontextmanager
async def server(work: Serve, path: Path, limit: int = 1 << 22) -> AsyncIterator[Served]:
    """Serve a unix socket in the guest for a block."""
    served = Served(work)
    async with await asyncio.start_unix_server(served.serve, path, limit=limit):
        yield served


async def reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer at the end of the input, which only a half-closed connection can show."""
    data = await reader.read(-1)
    writer.write(data[::-1])
    await writer.drain()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer at once."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send 4 MiB."""
    del reader
    writer.write(FLOOD)
    await writer.drain()


FLOOD = random.Random(7).randbytes(4 * MIB)


@pytest.mark.parametrize("kind", ["port", "path"])
async def test_both_directions_and_their_ends(vm: AsyncMachine, tmp_path: Path, kind: str) -> None:
    """A megabyte goes to a server that answers when its input has ended, and comes back."""
    data = os.urandom(MIB)
    async with contextlib.AsyncExitStack() as stack:
        to: int | str
        if kind == "path":
            await stack.enter_async_context(server(reverse, tmp_path / "s"))
            to = f"unix:{tmp_path}/s"
        else:
            opened = await asyncio.start_server(Served(reverse).serve, "127.0.0.1", 0)
            await stack.enter_async_context(opened)
            to = int(opened.sockets[0].getsockname()[1])
            stack.enter_context(listening(to))
        async with vm.connect(to) as (reader, writer):
            writer.write(data)
            await writer.drain()
            writer.write_eof()
            assert await reader.read() == data[::-1]


async def test_the_server_may_end_its_direction_first(vm: AsyncMachine, tmp_path: Path) -> None:
    """After the end of the server's bytes the client's still arrive."""

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        writer.write(b"first")
        writer.write_eof()
        return len(await reader.read())

    async with server(work, tmp_path / "s") as served, vm.connect(f"unix:{tmp_path}/s") as (reader, writer):
        assert await reader.read() == b"first"
        writer.write(bytes(MIB))
        await writer.drain()
        writer.write_eof()
        assert await served.ended.get() == MIB


async def test_bytes_arrive_although_the_block_ends(vm: AsyncMachine, tmp_path: Path) -> None:
    """A client that sends and leaves, without waiting for anything, has sent it. The server reads late."""
    leaving = asyncio.Event()

    async def work(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> bytes:
        await leaving.wait()
        digest = hashlib.sha256()
        while data := await reader.read(1000):
            digest.update(data)
        return digest.digest()

    async with server(work, tmp_path / "s", limit=1000) as served:
        for sent in (b"notice", os.urandom(MIB)):
            async with vm.connect(f"unix:{tmp_path}/s") as (_, writer):
                writer.write(sent)
                leaving.set()
            assert await served.ended.get() == hashlib.sha256(sent).digest()


async def test_what_cannot_be_reached(vm: AsyncMachine, fake_host: AsyncHost, tmp_path: Path) -> None:
    """Each error says what was tried, and its hint says what to do."""
    (tmp_path / "file").touch()
    refused: dict[int | str, tuple[int, str]] = {
        1: (errno.ECONNREFUSED, "port 1 in the guest: Connection refused"),
        f"unix:{tmp_path}/none": (errno.ENOENT, "/none in the guest: No such file"),
        f"unix:{tmp_path}/file": (errno.ECONNREFUSED, "/file in the guest: Connection refused"),
        f"unix:{tmp_path}/{'x' * 120}": (errno.ENAMETOOLONG, "File name too long"),
    }
    for to, (number, message) in refused.items():
        with pytest.raises(GuestRefused, match=message) as caught:
            async with vm.connect(to):
                pass
        assert caught.value.errno == number
        assert caught.value.hint
    for wrong in (0, 65536, -1, "80", "tcp:80", "unix:run/x", "unix:@", "unix:/", "unix:/a\0b", True):
        with pytest.raises(UsageError) as misused:
            vm.connect(wrong)
        assert misused.value.hint
    await vm.standby()
    with pytest.raises(IllegalTransition, match="Standby"):
        async with vm.connect(80):
            pass
    with pytest.raises(NotFound):
        async with fake_host.stream(ConnectRequest(instance="nobody", to=80)):
            pass


async def test_a_broken_connection_is_no_end(vm: AsyncMachine, tmp_path: Path) -> None:
    """A reset is an error of the next read, and of the block."""

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        writer.transport.abort()

    async def read(port: int) -> None:
        async with vm.connect(port) as (reader, writer):
            writer.write(b"x")
            await reader.read()
            pytest.fail("the read has returned")

    async def receive(port: int) -> None:
        async with vm.connect(port).as_socket() as sock:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, b"x")
            assert await loop.sock_recv(sock, 1) == b""

    opened = await asyncio.start_server(Served(work).serve, "127.0.0.1", 0)
    port = int(opened.sockets[0].getsockname()[1])
    async with opened:
        with listening(port):
            for work_of_a_client in (read, receive):
                with pytest.raises(GuestRefused, match=f"port {port} was lost: Connection reset") as caught:
                    await work_of_a_client(port)
                assert caught.value.errno == errno.ECONNRESET


async def test_the_machine_ends(vm: AsyncMachine, tmp_path: Path) -> None:
    """The reader of an open connection is told, and so is the end of its block."""

    async def client() -> None:
        async with vm.connect(f"unix:{tmp_path}/s") as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            assert vm.record.vmm is not None
            os.kill(vm.record.vmm.pid, signal.SIGKILL)
            await reader.read()
            pytest.fail("the read has returned")

    async with server(echo, tmp_path / "s"):
        with pytest.raises(CoppiceError) as caught:
            await client()
        assert caught.value.code == VmmDied.code


async def test_a_server_that_closes_early_is_still_heard(vm: AsyncMachine, tmp_path: Path) -> None:
    """An answer that arrives in the middle of an upload is read, and the upload ends."""

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"413 too large")
        await writer.drain()

    async def upload(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()

    heard = b""
    async with server(work, tmp_path / "s"):
        # A server that has not read all that was sent resets the connection, which is reported at the end.
        with contextlib.suppress(GuestRefused):
            async with vm.connect(f"unix:{tmp_path}/s") as (reader, writer):
                uploading = asyncio.create_task(upload(writer))
                heard = await reader.readuntil(b"large")
                await uploading
    assert heard == b"413 too large"


async def test_many_at_once(vm: AsyncMachine, tmp_path: Path) -> None:
    """Eight connections echo a megabyte each, and none gets another's."""

    async def one() -> bool:
        data = os.urandom(MIB)
        async with vm.connect(f"unix:{tmp_path}/s") as (reader, writer):
            writer.write(data)
            got = await reader.readexactly(MIB)
            writer.write_eof()
            assert await reader.read() == b""
            return hashlib.sha256(got).digest() == hashlib.sha256(data).digest()

    async with server(echo, tmp_path / "s"):
        assert await asyncio.gather(*(one() for _ in range(8))) == [True] * 8


async def test_a_slow_reader_stalls_nobody_else(vm: AsyncMachine, tmp_path: Path) -> None:
    """While nobody reads a flood, another connection works. The flood waits, and loses nothing."""
    async with (
        server(flood, tmp_path / "flood") as flooding,
        server(echo, tmp_path / "echo"),
        vm.connect(f"unix:{tmp_path}/flood") as (slow, _),
    ):
        await slow.readexactly(1)
        for _ in range(3):
            async with vm.connect(f"unix:{tmp_path}/echo") as (reader, writer):
                for number in range(20):
                    writer.write(b"%d\n" % number)
                    assert await reader.readline() == b"%d\n" % number
        assert flooding.ended.empty()
        assert await slow.read() == FLOOD[1:]


@pytest.mark.parametrize("left", ["idle", "full"])
async def test_a_client_that_goes_away_ends_the_connection(vm: AsyncMachine, tmp_path: Path, left: str) -> None:
    """Its server in the guest notices, also if that server does not read."""
    leaving = asyncio.Event()

    async def work(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> int:
        if left == "full":
            await leaving.wait()
        return len(await reader.read())

    async def client() -> None:
        async with vm.connect(f"unix:{tmp_path}/s") as (_, writer):
            writer.write(bytes(8 * MIB))
            if left == "idle":
                await writer.drain()
            leaving.set()
            await asyncio.Event().wait()

    async with server(work, tmp_path / "s") as served:
        task = asyncio.create_task(client())
        await leaving.wait()
        task.cancel()
        await asyncio.wait({task})
        assert isinstance(await served.ended.get(), int | ConnectionError)
