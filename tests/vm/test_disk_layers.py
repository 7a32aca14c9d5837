"""Disks of real forks: a fork writes nothing of its source's disk, and keeps its own."""

from __future__ import annotations

import asyncio

import pytest

from coppice.client import AsyncHost
from coppice.machine import disk
from coppice.model import MIB, Instance, State
from coppice.requests import ExecRequest, ForkRequest, RestoreRequest, RmRequest, StandbyRequest

DATA = 16 * MIB


async def sh(host: AsyncHost, vm: Instance, script: str) -> str:
    """Run a shell script in the guest, which must succeed; return its output."""
    result = await host.call(ExecRequest(instance=vm.id, argv=["sh", "-ec", script], timeout_s=120))
    assert result.exit_code == 0, result
    return result.stdout.decode().strip()


@pytest.mark.timeout(300)
async def test_a_fork_of_a_full_disk_writes_little(
    host: AsyncHost, vm: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forks at two levels share the files below their own; each reads the data and keeps its words."""
    monkeypatch.setattr(disk, "reflink_file", lambda *_, **__: False)
    made: list[Instance] = []
    digest = await sh(host, vm, f"yes | head -c {DATA} >/root/data; echo oak >/root/word; cksum </root/data")
    vm = (await host.call(StandbyRequest(instance=vm.id))).instance
    try:
        source = vm
        for word in ("ash", "elm"):
            report = await host.call(ForkRequest(instance=source.id, atomic=True))
            (fork,) = report.instances
            made.append(fork)
            assert report.results[0].disk_bytes_written <= 64 << 10
            written = disk.paths(host.local.rooms.directory(fork.id), fork.disk_layers)[-1]
            assert await sh(host, fork, "cksum </root/data") == digest
            await sh(host, fork, f"echo {word} >>/root/word; sync")
            assert written.stat().st_blocks * 512 <= 2 * MIB
            source = (await host.call(StandbyRequest(instance=fork.id))).instance
        assert len(source.disk_layers) == len(vm.disk_layers) + 2
        ash = await host.call(RestoreRequest(instance=made[0].id))
        assert (ash.state, await sh(host, ash, "cat /root/word")) == (State.RUNNING, "oak\nash")
        await sh(host, ash, "echo more >>/root/word; sync")
        elm = await host.call(RestoreRequest(instance=made[1].id))
        assert await sh(host, elm, "cat /root/word; cksum </root/data") == f"oak\nash\nelm\n{digest}"
        await host.call(StandbyRequest(instance=ash.id))
        assert (await host.verify()).differences == ()
    finally:
        await asyncio.gather(*(host.call(RmRequest(instance=each.id)) for each in made))
