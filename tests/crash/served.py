"""Kill a server during an operation of a client, which repeats its request at the next server and gets
the result as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coppice.client import AsyncHost
from coppice.client.connecting import connect_async
from crash.kills import Ground, HostProcesses, Recovered
from crash.operation import Operation
from crash.steps import Measured

_SOCKET = "server.sock"
_DEADLINE_S = 90.0


class ServerProcesses(HostProcesses):
    """Processes of `coppice serve`, one at a time; see `crash.server_process`."""

    @classmethod
    def program(cls, home: Path) -> Sequence[str]:
        return "crash.server_process", str(home), str(home.parent / _SOCKET)

    async def start(self, step: int) -> tuple[int, Recovered]:
        """Start a server, and wait until it listens. Return its pid and what it recovered."""
        begin = time.monotonic()
        pid = await self._order(str(step))
        recovered = []
        while (line := await self._line()).startswith("recovered: "):
            recovered.append(line.removeprefix("recovered: "))
        assert line.startswith("listening on "), line
        return pid, Recovered(recovered, (time.monotonic() - begin) * 1000)


class ServedGround(Ground[ServerProcesses]):
    """A data directory in which servers are killed. The client must get its result in any case."""

    sampled = True

    @property
    def machines(self) -> str:
        return f"a server over {self.kind.name}"

    async def _run(self, operation: Operation) -> Measured:
        pid, _ = await self.processes.start(0)
        async with self._client() as host:
            await operation.act(host, self.kind)
        return msgspec.json.decode((await self._end(pid))[-1], type=Measured)

    async def kill_at_step(self, operation: Operation, number: int) -> bool:
        """Let the server kill itself at a step."""
        await self._prepare(operation)
        pid, _ = await self.processes.start(number)
        recovered: Recovered | None = None
        async with self._client() as host, _acting(operation.act(host, self.kind)) as acting:
            ended = asyncio.ensure_future(self.processes.end())
            either: set[asyncio.Future[Any]] = {acting, ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                os.kill(pid, signal.SIGTERM)
            status, said = await ended
            assert status in (0, -signal.SIGKILL), said
            if status:
                recovered = await self._finish(acting)
        step = said[-1] if status else None
        await self._check(operation, "step", number, step, bool(status), recovered, acting)
        return bool(status)

    async def kill_after(self, operation: Operation, delay_s: float) -> bool:
        """Kill the server."""
        await self._prepare(operation)
        pid, _ = await self.processes.start(0)
        async with self._client() as host, _acting(operation.act(host, self.kind)) as acting:
            await asyncio.sleep(delay_s)
            died = not acting.done()
            os.kill(pid, signal.SIGKILL)
            await self.processes.end()
            recovered = await self._finish(acting)
        at = round(delay_s * 1000, 1)
        await self._check(operation, "instant", at, None, died, recovered, acting)
        return died

    def _client(self) -> AsyncHost:
        return connect_async(f"unix:{self.home.parent / _SOCKET}")

    async def _finish(self, acting: asyncio.Future[object]) -> Recovered:
        """Start the next server, and wait until the client has its result."""
        pid, recovered = await self.processes.start(0)
        await asyncio.wait({acting}, timeout=_DEADLINE_S)
        await self._end(pid)
        return recovered

    async def _end(self, pid: int) -> list[str]:
        """End a server in order. Return the lines that it printed."""
        os.kill(pid, signal.SIGTERM)
        status, said = await self.processes.end()
        assert status == 0, said
        return said

    async def _check(
        self,
        operation: Operation,
        kind: str,
        at: float,
        step: str | None,
        died: bool,
        recovered: Recovered | None,
        acting: asyncio.Future[object],
    ) -> None:
        """Check that the client has its result, and that the operation was carried out once."""
        expected = operation.carried_out()
        failure = TimeoutError("the client got no answer") if acting.cancelled() else acting.exception()
        await self._look(expected, kind=kind, at=at, step=step, died=died, recovered_before=recovered, failure=failure)


@contextlib.asynccontextmanager
async def _acting(work: Awaitable[object]) -> AsyncIterator[asyncio.Future[object]]:
    """Do work next to the block, which waits for its end."""
    acting = asyncio.ensure_future(work)
    try:
        yield acting
        await asyncio.wait({acting}, timeout=_DEADLINE_S)
    finally:
        acting.cancel()
        await asyncio.wait({acting})
