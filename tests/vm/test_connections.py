"""Servers in real guests are reached on their own loopback and on unix sockets, in each fork apart."""

from __future__ import annotations

import asyncio
import hashlib
import os

import pytest

from coppice.client import AsyncHost, AsyncMachine
from coppice.errors import GuestRefused
from coppice.model import MIB, Instance

# On port 9222 of the loopback it sends back what it gets. On a unix socket it answers from its memory.
SERVER = """
import os, socket, threading
asked = 0
def echo(sock):
    with sock:
        while data := sock.recv(65536): sock.sendall(data)
def answer(sock):
    global asked
    with sock:
        asked += 1
        sock.sendall(f"{sock.makefile().readline().strip()} {os.uname().nodename} {asked}".encode())
def serve(listener, work):
    while True: threading.Thread(target=work, args=(listener.accept()[0],)).start()
tcp = socket.create_server(("127.0.0.1", 9222))
unix = socket.socket(socket.AF_UNIX)
unix.bind("/run/app.sock")
unix.listen()
threading.Thread(target=serve, args=(tcp, echo)).start()
serve(unix, answer)
"""
START = 'python3 -c "$1" </dev/null >/run/server.log 2>&1 & until test -S /run/app.sock; do sleep 0.1; done'
PORT = 9222


@pytest.fixture
async def serving(host: AsyncHost, vm: Instance) -> AsyncMachine:
    """A machine with the server, which has been asked once."""
    machine = host.machine(vm)
    assert (await machine.exec(["sh", "-c", START, "sh", SERVER], timeout_s=120)).exit_code == 0
    assert await ask(machine, "first") == f"first {vm.name} 1"
    return machine


async def ask(machine: AsyncMachine, word: str) -> str:
    """Return the answer of the server on the unix socket."""
    async with asyncio.timeout(60), machine.connect("unix:/run/app.sock") as (reader, writer):
        writer.write(f"{word}\n".encode())
        return (await reader.read()).decode()


async def echoed(machine: AsyncMachine, data: bytes) -> str:
    """Return the digest of what comes back from the TCP port."""
    async with machine.connect(PORT) as (reader, writer):
        writer.write(data)
        writer.write_eof()
        return hashlib.sha256(await reader.read()).hexdigest()


async def test_the_warm_server_of_each_fork_is_reached(serving: AsyncMachine) -> None:
    """Forks of the running machine go on with its state, and each answers as itself."""
    async with serving.fork(2, from_running=True, atomic=True) as forks:
        for count in (2, 3):
            answers = await asyncio.gather(*(ask(fork, "hello") for fork in forks))
            assert answers == [f"hello {fork.name} {count}" for fork in forks]
        data = os.urandom(MIB // 4)
        expected = hashlib.sha256(data).hexdigest()
        async with asyncio.timeout(60):
            assert await asyncio.gather(*(echoed(fork, data) for fork in forks)) == [expected] * 2
        with pytest.raises(GuestRefused, match="Connection refused"):
            async with forks[0].connect(PORT + 1):
                pass
    assert await ask(serving, "again") == f"again {serving.name} 2"


async def test_many_connections_and_a_slow_reader(serving: AsyncMachine) -> None:
    """Eight echo a megabyte each while another one is not read at all. Nothing is lost or mixed up."""
    blocks = [os.urandom(MIB) for _ in range(8)]
    async with asyncio.timeout(120), serving.connect(PORT) as (slow, writer):
        writing = asyncio.create_task(_write(writer, blocks))
        digests = await asyncio.gather(*(echoed(serving, block) for block in blocks))
        assert digests == [hashlib.sha256(block).hexdigest() for block in blocks]
        assert await slow.read() == b"".join(blocks)
        await writing


async def _write(writer: asyncio.StreamWriter, blocks: list[bytes]) -> None:
    for block in blocks:
        writer.write(block)
        await writer.drain()
    writer.write_eof()
