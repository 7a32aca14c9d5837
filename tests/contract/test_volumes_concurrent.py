"""Concurrent and cancelled uses of a volume keep the rule: one writer or any number of readers."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import CoppiceError, InUse, NotFound
from coppice.model import Instance
from coppice.requests import RmRequest
from fakes.hosting import assert_tidy, boot, cancelled_at, make_threads_late
from fakes.volumes import READS, SIZE, WRITES

RIVAL = """
import asyncio, sys
from pathlib import Path
from coppice.client import AsyncHost
from fakes.driver import FakeDriver
from fakes.rooms import DEADLINES, open_rooms
from test_volumes_concurrent import grab

async def main(program, home):
    driver = FakeDriver(Path(program))
    async with AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        print("begin", flush=True)
        sys.stdin.readline()
        await grab(host, "theirs")

asyncio.run(main(*sys.argv[1:]))
"""


async def grab(host: AsyncHost, prefix: str) -> Counter[str]:
    """Attach the volume for writing and for reading, again and again, and check the
    rule each time.
    """
    seen: Counter[str] = Counter()
    for number in range(12):
        names = [f"{prefix}-{number}-{each}" for each in range(2)]
        volumes = READS if number % 3 == 2 else WRITES
        outcomes = await asyncio.gather(
            *(boot(host, name, volumes=volumes, start=False) for name in names), return_exceptions=True
        )
        holders = (await host.volumes.inspect("data")).volume.attachments
        assert len(holders) <= 1 or all(holder.readonly for holder in holders), holders
        for name, outcome in zip(names, outcomes, strict=True):
            seen[type(outcome).__name__] += 1
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, InUse), outcome
            else:
                await host.call(RmRequest(instance=name))
    return seen


async def test_two_processes_race_for_one_volume(fake_host: AsyncHost, fake_vmm: Path, fake_home: Path) -> None:
    """The transaction that records a holder keeps the rule: there are never two writers, or a
    writer and a reader.
    """
    await fake_host.volumes.create("data", size_bytes=SIZE)
    here = Path(__file__).parent  # has a conftest of its own, which must not hide that of all tests
    paths = os.pathsep.join([str(here.parent), str(here), *(path for path in sys.path if path)])
    rival = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", RIVAL, str(fake_vmm), str(fake_home)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert rival.stdout is not None
    assert rival.stdin is not None
    assert await asyncio.wait_for(rival.stdout.readline(), 30) == b"begin\n"
    rival.stdin.write(b"go\n")
    async with asyncio.timeout(60):
        mine, said = await asyncio.gather(grab(fake_host, "mine"), rival.communicate())
    assert rival.returncode == 0, said[1].decode()
    assert mine["InUse"] >= 8  # one of each two writers is refused
    assert mine["Instance"] >= 1
    await assert_tidy(fake_host)


async def test_a_volume_is_removed_or_attached(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """Either the attachment finds the volume removed, or the removal finds it in use."""
    async with make_host() as other:
        for number in range(8):
            await fake_host.volumes.create("data", size_bytes=SIZE)
            attached, removed = await asyncio.gather(
                boot(fake_host, f"oak-{number}", volumes=WRITES, start=False),
                other.volumes.rm("data"),
                return_exceptions=True,
            )
            assert isinstance(attached, CoppiceError) != isinstance(removed, CoppiceError), (attached, removed)
            if isinstance(attached, Instance):
                assert isinstance(removed, InUse)
                await fake_host.call(RmRequest(instance=attached.id))
                await fake_host.volumes.rm("data")
            else:
                assert isinstance(attached, NotFound)
            await assert_tidy(fake_host)


@pytest.mark.parametrize("operation", ["create", "rm", "run"])
async def test_a_cancelled_operation_is_done_or_undone(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """A cancellation at any wait leaves nothing half-made, and no holder that does not exist."""
    make_threads_late(monkeypatch)
    if operation == "run":
        await fake_host.volumes.create("data", size_bytes=SIZE)
    for nth in range(1, 200):
        if operation == "rm":
            if not await fake_host.volumes.ls():
                await fake_host.volumes.create("data", size_bytes=SIZE)
            came = await cancelled_at(fake_host.volumes.rm("data"), nth)
        elif operation == "create":
            came = await cancelled_at(fake_host.volumes.create("data", size_bytes=SIZE), nth)
        else:
            came = await cancelled_at(boot(fake_host, volumes=READS, start=False), nth)
        if not came:
            break
        await assert_tidy(fake_host)
        if operation == "create":
            assert await fake_host.volumes.ls() == []
    else:
        pytest.fail("the operation waits more often than this test cancels")
    assert nth > 3
    await assert_tidy(fake_host, *(["oak"] if operation == "run" else []))
    assert len(await fake_host.volumes.ls()) == (0 if operation == "rm" else 1)
