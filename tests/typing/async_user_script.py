"""A script as a user of the asyncio API would write it. It is never run: mypy --strict and pyright
must accept it.
"""

from __future__ import annotations

import asyncio
import socket
from typing import assert_type

import coppice


async def main() -> None:
    """Use every kind of method."""
    async with coppice.AsyncHost() as host:
        vm = await host.run("debian", name="warm")
        assert_type(vm, coppice.AsyncMachine)
        await vm.exec(["sh", "-c", "echo expensive > /run/state"])
        template = await vm.freeze()
        async with template.fork(4) as forks:
            assert_type(forks, coppice.AsyncForks)
            assert_type(await asyncio.gather(*(f.read_text("/run/state") for f in forks)), list[str])
        async with await template.fork(2, atomic=True) as forks:
            assert_type(forks[-1], coppice.AsyncMachine)
        task = asyncio.create_task(template.fork_one(payload=b"{}"))
        assert_type(await task, coppice.AsyncMachine)
        async with host.run("debian") as other, other.open_exec(["cat"]) as session:
            await session.eof()
            async for stream, data in session:
                assert_type(data, bytes)
                assert stream
            assert_type(await session.wait(), coppice.Exit)
        async with vm.connect(9222) as (reader, writer):
            writer.write(b"ping")
            assert_type(await reader.readline(), bytes)
        async with vm.connect("unix:/run/app.sock").as_socket() as sock:
            assert_type(sock, socket.socket)
        async for line in vm.logs(follow=True):
            assert_type(line, bytes)
        assert_type(await vm.stop(), coppice.AsyncMachine)
        assert_type(await vm.standby(), coppice.CaptureReport)
        assert_type(await host.ls(), list[coppice.AsyncMachine])
        assert_type(await host.snapshots.fork_one("before"), coppice.AsyncMachine)


if __name__ == "__main__":
    asyncio.run(main())
