"""What a server keeps of operations that have ended."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from coppice.errors import NoSpace
from coppice.model import Progress, ProgressSink
from coppice.server import running
from coppice.server.running import Limits, Operations


class Body(bytearray):
    """The body of a request."""


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_a_failed_operation_keeps_no_body(end: str) -> None:
    """Its error refers to no frames: those of thousands of failed uploads would fill the memory for an hour."""
    operations = Operations(Limits())
    begun = asyncio.Event()
    bodies: list[weakref.ref[Body]] = []

    async def work(_: ProgressSink) -> None:
        body = Body(1 << 20)
        bodies.append(weakref.ref(body))
        begun.set()
        if end == "cancelled":
            await asyncio.Event().wait()
        try:
            raise OSError("no")
        except OSError as error:
            raise NoSpace(f"{len(body)} bytes do not fit") from error

    operation = operations.start("write_file", None, work)
    async with asyncio.timeout(10):
        await begun.wait()
        if end == "cancelled":
            await operations.cancel(operation)
        else:
            with pytest.raises(NoSpace):
                await operation.result()
    gc.collect()
    assert [body() for body in bodies] == [None]
    assert operations.get(operation.id, None).view().status == end


async def test_a_late_step_changes_no_sum() -> None:
    """A thread may report one after the end. What is subtracted later is what was added."""
    operations = Operations(Limits())
    sinks: list[ProgressSink] = []

    async def work(sink: ProgressSink) -> None:
        sinks.append(sink)

    operation = operations.start("fork", None, work)
    async with asyncio.timeout(10):
        await operation.result()
    await asyncio.sleep(0)
    before = operations._bytes
    assert before > 0
    operation._forks.append(Progress(stage="fork"))
    operations._ended[0] = (0.0, *operations._ended[0][1:])
    operations._forget()
    assert operations._bytes == 0


async def test_the_latest_operation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large its result is: its client has not looked it up yet."""
    monkeypatch.setattr(running, "MOST_BYTES", 1 << 20)
    operations = Operations(Limits())

    async def work(_: ProgressSink) -> bytes:
        return bytes(2 << 20)

    async with asyncio.timeout(10):
        for _ in range(2):
            last = operations.start("read_file", None, work)
            await last.result()
            await asyncio.sleep(0)
    assert operations.all(None) == [last]
