"""A guest whose kernel has ended while its VMM runs on: sessions with it end too."""

from __future__ import annotations

import asyncio

import pytest

from coppice.client import AsyncHost
from coppice.errors import GuestError
from coppice.host import guest
from coppice.model import Instance
from coppice.requests import ExecRequest, OpenExecRequest
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import boot

HALTED = "[   25.5] reboot: System halted\n"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The console is read often, and an agent is silent soon."""
    monkeypatch.setattr(guest, "_LOOK_S", 0.02)
    monkeypatch.setattr(guest, "_SILENT_S", 0.5)


def halt(host: AsyncHost, instance: Instance) -> None:
    """Have the guest's kernel say that it has halted."""
    with (host.local.rooms.directory(instance.id) / files.CONSOLE_LOG).open("a") as console:
        console.write(HALTED)


async def test_a_command_ends_when_its_guest_has_halted(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """One that is waited for, and one whose output is read; the error says how to end the machine."""
    oak = await boot(fake_host)
    silence = driver.faults.hold_at("health")
    waiting = asyncio.create_task(fake_host.call(ExecRequest(instance="oak", argv=["sleep"])))
    async with fake_host.stream(OpenExecRequest(instance="oak", argv=["sleep"], stdin=False)) as session:
        halt(fake_host, oak)
        async with asyncio.timeout(20):
            with pytest.raises(GuestError, match="halted") as ended:
                await session.wait()
            with pytest.raises(GuestError, match="halted"):
                await waiting
    assert "stop --grace 0 oak" in str(ended.value.hint)
    silence.release.set()


async def test_a_console_that_only_says_so_ends_nothing(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Any program in the guest can write there, and the agent still answers."""
    oak = await boot(fake_host)
    async with fake_host.stream(OpenExecRequest(instance="oak", argv=["cat"], stdin=True)) as session:
        halt(fake_host, oak)
        asked = driver.faults.reached["health"]
        async with asyncio.timeout(20):
            while driver.faults.reached["health"] < asked + 3:  # noqa: ASYNC110 - the host asks in its own time
                await asyncio.sleep(0.02)
        await session.send_stdin(b"on")
        await session.eof()
        assert (await session.wait()).exit_code == 0
