"""Machines that end on their own: a dead guest, a killed VMM or a reboot of the host is reported
truthfully, and nothing hangs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from coppice.client import AsyncHost
from coppice.errors import CoppiceError
from coppice.model import Instance, State, VmmProcess
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    LsRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StartRequest,
)
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.vmm.process import start_ticks, wait_exit
from machines import digest, mem_file, require_sysrq
from platforms import Platform

# Overwrite the code of process 1: the kernel panics when it dies. This needs no magic SysRq key.
PANIC = """
import os, re, signal, time
for line in open("/proc/1/maps"):
    first, last = (int(number, 16) for number in re.match("([0-9a-f]+)-([0-9a-f]+)", line).groups())
    if " r-xp " in line and "[v" not in line:
        with open("/proc/1/mem", "r+b", buffering=0) as memory:
            memory.seek(first)
            memory.write(bytes(last - first))
os.kill(1, signal.SIGCHLD)
time.sleep(60)
"""
POWER_OFF = "echo o >/proc/sysrq-trigger; sleep 60"


async def end(host: AsyncHost, vm: Instance, *argv: str) -> None:
    """Run a command that ends the machine, and wait until it has ended."""
    with pytest.raises(CoppiceError):
        await host.call(ExecRequest(instance=vm.id, argv=argv, timeout_s=30))
    assert vm.vmm is not None
    await asyncio.wait_for(wait_exit(vm.vmm), 30)


async def seen_by_another_process(home: Path, vm: Instance) -> tuple[str, str]:
    """Return state and reason as the command line shows them; it did not start the machine, so it
    gets no exit status.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import coppice.cli; coppice.cli.main()"),
        *("--home", str(home), "--json", "inspect", vm.name),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    (shown,) = json.loads(output)
    return shown["instance"]["state"], shown["instance"]["exit_reason"]


async def test_a_guest_that_panics_is_seen_by_any_process(home: Path, host: AsyncHost, vm: Instance) -> None:
    """A process that did not start the machine also sees Stopped and the reason, and the disk of a
    panicked kernel boots.
    """
    await end(host, vm, "python3", "-c", PANIC)
    reason = "its kernel panicked: Attempted to kill init! exitcode=0x0000000b"
    assert await seen_by_another_process(home, vm) == ("Stopped", reason)
    (listed,) = [found for found in await host.call(LsRequest()) if found.id == vm.id]
    assert (listed.state, listed.exit_reason, listed.vmm) == (State.STOPPED, reason, None)
    async with (await host.get(vm.id)).fork(1, target=State.RUNNING, atomic=True) as (fork,):
        assert (await fork.exec(["hostname"])).stdout.decode().strip() == fork.name


async def test_a_guest_that_powers_off_is_seen_by_any_process(home: Path, host: AsyncHost, vm: Instance) -> None:
    """A process that did not start the machine also sees Stopped and the reason; the disk can be
    forked.
    """
    await require_sysrq(host, vm)
    await end(host, vm, "sh", "-c", POWER_OFF)
    assert await seen_by_another_process(home, vm) == ("Stopped", "the guest powered off")
    async with (await host.get(vm.id)).fork(1, target=State.STOPPED, atomic=True) as (fork,):
        assert fork.record.state is State.STOPPED


async def test_after_a_reboot_of_the_host(home: Path, platform: Platform, host: AsyncHost, template: Instance) -> None:
    """All VMMs are gone and other programs have their pids.

    These are left alone, no machine counts as running, and all captures are intact.
    """
    before = await digest(mem_file(host, template))
    running, working, parked = (await host.call(ForkRequest(instance=template.id, count=3, atomic=True))).instances
    await host.call(StandbyRequest(instance=parked.id))
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
        host.local.rooms.layout.database, (stranger.pid, ticks - 1)
    )  # as a process that was at work when the power failed
    for vm, process in zip((running, working), pids, strict=True):
        store.save(msgspec.structs.replace(vm, vmm=process))
    store.begin(msgspec.structs.replace(working, vmm=pids[1]), JournalOperation.STANDBY)
    store.close()
    try:
        async with platform.host(home) as after:
            shown = {vm.name: vm for vm in await after.call(LsRequest())}
            assert [shown[vm.name].state for vm in (running, working, parked)] == [
                State.STOPPED,
                State.STOPPED,
                State.STANDBY,
            ]
            assert shown[running.name].exit_reason == "the VMM ended: exit status unknown"
            assert shown[working.name].exit_reason == "standby was interrupted"
            assert after.local.rooms.store.journal() == []
            await after.call(StartRequest(instance=running.id))
            await after.call(RestoreRequest(instance=parked.id))
            async with (await after.get(template.id)).fork(1, atomic=True) as (fork,):
                for vm in (running, parked, fork.record):
                    assert (
                        await after.call(ExecRequest(instance=vm.id, argv=["hostname"]))
                    ).stdout.decode().strip() == vm.name
            assert await digest(mem_file(after, template)) == before
            for vm in (running, working, parked):
                await after.call(RmRequest(instance=vm.id))
        assert start_ticks(stranger.pid) == ticks
    finally:
        stranger.kill()
        await stranger.wait()
