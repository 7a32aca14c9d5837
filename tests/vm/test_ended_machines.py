"""Machines that end without being asked to: the guest dies, the VMM is killed, the host reboots. All of it shows truthfully, and nothing is stuck."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from coppice.errors import CoppiceError
from coppice.host import AsyncHost
from coppice.model import Instance, State, VmmProcess
from coppice.store.store import Store
from coppice.vmm.process import start_ticks, wait_exit
from machines import digest, mem_file


async def press(host: AsyncHost, vm: Instance, key: str) -> None:
    """Have the guest's kernel do what a magic key does, and wait until the machine has ended."""
    with pytest.raises(CoppiceError):
        await host.exec(vm, ["sh", "-c", f"echo {key} >/proc/sysrq-trigger; sleep 60"], timeout_s=30)
    assert vm.vmm is not None
    await asyncio.wait_for(wait_exit(vm.vmm), 30)


async def seen_by_another_process(home: Path, vm: Instance) -> tuple[str, str]:
    """State and reason as the command line shows them: it did not start the machine, and learns no exit status."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import coppice.cli; coppice.cli.main()"),
        *("--home", str(home), "--json", "inspect", vm.name),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    (shown,) = json.loads(output)
    return shown["instance"]["state"], shown["instance"]["exit_reason"]


@pytest.mark.parametrize(
    ("key", "reason"),
    [("c", "its kernel panicked: sysrq triggered crash"), ("o", "the guest powered off")],
    ids=["panic", "power off"],
)
async def test_a_guest_that_dies_is_seen_by_any_process(
    home: Path, host: AsyncHost, vm: Instance, key: str, reason: str
) -> None:
    """Stopped, and why: also for a process that did not start it, and so cannot ask the kernel."""
    await press(host, vm, key)
    assert await seen_by_another_process(home, vm) == ("Stopped", reason)
    (listed,) = [found for found in await host.ls() if found.id == vm.id]
    assert (listed.state, listed.exit_reason, listed.vmm) == (State.STOPPED, reason, None)
    target = State.RUNNING if key == "c" else State.STOPPED  # of the disk that a dead kernel left, which boots
    (fork,) = (await host.fork(vm, target=target, atomic=True)).instances
    try:
        assert fork.state is target
        if target is State.RUNNING:
            assert (await host.exec(fork, ["hostname"])).stdout.decode().strip() == fork.name
    finally:
        await host.rm(fork)


async def test_after_a_reboot_of_the_host(home: Path, host: AsyncHost, template: Instance) -> None:
    """All VMMs are gone and their pids are other programs': these are not touched, nothing is believed to run, and all that was captured is there."""
    before = await digest(mem_file(host, template))
    running, working, parked = (await host.fork(template, count=3, atomic=True)).instances
    await host.standby(parked)
    stranger = await asyncio.create_subprocess_exec("sleep", "1000")
    ticks = start_ticks(stranger.pid)
    assert ticks is not None
    for vm in (running, working):
        assert vm.vmm is not None
        os.kill(vm.vmm.pid, signal.SIGKILL)
        await wait_exit(vm.vmm)
    pids = (
        VmmProcess(pid=stranger.pid, start_ticks=ticks - 1, executable=running.vmm.executable if running.vmm else ""),
        VmmProcess(pid=stranger.pid, start_ticks=ticks, executable="/usr/bin/qemu-system-x86_64"),
    )
    store = Store(
        host.rooms.layout.database, (stranger.pid, ticks - 1)
    )  # of a process that worked on it when the power went
    for vm, process in zip((running, working), pids, strict=True):
        store.save(msgspec.structs.replace(vm, vmm=process))
    store.begin(msgspec.structs.replace(working, vmm=pids[1]), "standby")
    store.close()
    try:
        async with AsyncHost(home) as after:
            shown = {vm.name: vm for vm in await after.ls()}
            assert [shown[vm.name].state for vm in (running, working, parked)] == [
                State.STOPPED,
                State.STOPPED,
                State.STANDBY,
            ]
            assert shown[running.name].exit_reason == "the VMM ended: exit status unknown"
            assert shown[working.name].exit_reason == "standby was interrupted"
            assert after.rooms.store.journal() == []
            await after.start(running)
            await after.restore(parked)
            async with after.forks(template, 1) as (fork,):
                for vm in (running, parked, fork):
                    assert (await after.exec(vm, ["hostname"])).stdout.decode().strip() == vm.name
            assert await digest(mem_file(after, template)) == before
            for vm in (running, working, parked):
                await after.rm(vm)
        assert start_ticks(stranger.pid) == ticks
    finally:
        stranger.kill()
        await stranger.wait()
