"""A capture has every page that the guest wrote, on whatever mapping it ran."""

from __future__ import annotations

import asyncio

from coppice.host import AsyncHost
from coppice.model import MIB, Instance, Sharing, State
from machines import ask, digest, mem_file

# A 32 MiB pattern held by the warm process: each page is different, so that a lost or misplaced page changes the sum.
HOLD = "os.__dict__.setdefault('held', numpy.arange(4 << 20, dtype='u8') * {salt}).size"
SUM = "int(os.held.sum() % 1000003), int(os.held[12345])"


async def test_a_first_boot_writes_no_ram_at_standby(host: AsyncHost, image: str) -> None:
    """Guest RAM of a first boot is the mem-file: its capture writes none, and pauses for milliseconds."""
    vm = await host.run(image, ["sleep", "infinity"])
    try:
        inode = (host.rooms.directory(vm.id) / "memory.live").stat().st_ino
        parked, report = await host.standby(vm)
        assert report.ram_bytes_written == 0
        assert mem_file(host, vm).stat().st_ino == inode
        assert parked.mem_file is not None
        assert parked.mem_file.sharing is Sharing.OWN
        await host.restore(vm)
        assert (await host.exec(vm, ["echo", "back"])).stdout == b"back\n"
    finally:
        await host.rm(vm)


async def test_pages_of_a_fork_survive_its_capture(host: AsyncHost, template: Instance, vm: Instance) -> None:
    """Fork, write 32 MiB, standby, restore: all there; a fork of that fork sees it too; the base is unchanged."""
    base = mem_file(host, template)
    before = await digest(base)
    await ask(host, vm, HOLD.format(salt=7))
    held = await ask(host, vm, SUM)
    parked, report = await host.standby(vm)
    assert report.dirty_bytes >= 32 * MIB
    assert parked.state is State.STANDBY
    assert mem_file(host, vm).stat().st_ino != base.stat().st_ino
    assert mem_file(host, vm).stat().st_nlink == 1
    async with host.forks(parked, 2) as grandchildren:
        assert await asyncio.gather(*(ask(host, grandchild, SUM) for grandchild in grandchildren)) == [held, held]
        assert mem_file(host, grandchildren[0]).stat().st_ino == mem_file(host, vm).stat().st_ino
    await host.restore(parked)
    assert await ask(host, vm, SUM) == held
    assert await digest(base) == before


async def test_the_source_may_go(host: AsyncHost, vm: Instance) -> None:
    """Forks own what they map: a standby source is restored, captured anew and removed, and its forks do not notice."""
    await ask(host, vm, HOLD.format(salt=11))
    held = await ask(host, vm, SUM)
    parked, _ = await host.standby(vm)
    report = await host.fork(parked, count=2, atomic=True)
    idle = (await host.fork(parked, target=State.STANDBY)).instances[0]
    forks = [*report.instances, idle]
    try:
        await host.restore(parked)
        await ask(host, vm, "os.held.fill(0)")
        await host.standby(vm)
        await host.restore(vm)
        await host.restore(idle)
        assert [await ask(host, fork, SUM) for fork in forks] == [held] * 3
        await host.standby(forks[0])
        await host.restore(forks[0])
        assert await ask(host, forks[0], SUM) == held
    finally:
        await asyncio.gather(*(host.rm(fork) for fork in forks))


async def test_disk_and_memory_are_of_one_instant(host: AsyncHost, vm: Instance) -> None:
    """A counter in memory and the same counter in a file with fsync agree after a capture in the middle of their race."""
    script = """
import os, time
n = 0
with open("/run/writer", "w") as f: f.write(str(os.getpid()))
fd = os.open("/root/counter", os.O_WRONLY | os.O_CREAT)
while True:
    n += 1
    os.pwrite(fd, b"%020d" % n, 0); os.fsync(fd)
    with open("/dev/shm/counter.new", "w") as f: f.write("%020d" % n)
    os.rename("/dev/shm/counter.new", "/dev/shm/counter")
"""
    started = await host.exec(vm, ["sh", "-c", f"setsid python3 -c '{script}' >/dev/null 2>&1 </dev/null &"])
    assert started.exit_code == 0
    async with asyncio.timeout(30):
        while (await host.exec(vm, ["test", "-e", "/dev/shm/counter"])).exit_code:
            pass
    await host.standby(vm)
    async with host.forks(vm, 2) as forks:
        for fork in forks:
            stopped = await host.exec(
                fork, ["sh", "-c", "kill -STOP $(cat /run/writer); cat /root/counter; echo; cat /dev/shm/counter"]
            )
            on_disk, in_memory = (int(word) for word in stopped.stdout.split())
            assert 0 <= on_disk - in_memory <= 1
