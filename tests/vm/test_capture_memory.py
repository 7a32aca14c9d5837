"""A capture has every page that the guest wrote, on every kind of mapping."""

from __future__ import annotations

import asyncio

from coppice.client import AsyncHost
from coppice.machine import directory as directories
from coppice.model import MIB, Instance, Sharing, State
from coppice.requests import ExecRequest, ForkRequest, RestoreRequest, RmRequest, RunRequest, StandbyRequest
from machines import ask, digest, mem_file

# The warm process holds a 32 MiB pattern. Each page is different, so a lost or misplaced page
# changes the sum.
HOLD = "os.__dict__.setdefault('held', numpy.arange(4 << 20, dtype='u8') * {salt}).size"
SUM = "int(os.held.sum() % 1000003), int(os.held[12345])"


async def test_a_first_boot_writes_no_ram_at_standby(host: AsyncHost, image: str) -> None:
    """The guest RAM of a first boot is the mem-file, so its capture writes none."""
    vm = await host.call(RunRequest(image=image, command=["sleep", "infinity"]))
    try:
        inode = (host.local.rooms.directory(vm.id) / "memory.live").stat().st_ino
        done = await host.call(StandbyRequest(instance=vm.id))
        parked, report = done.instance, done.capture
        assert report.ram_bytes_written == 0
        assert mem_file(host, vm).stat().st_ino == inode
        assert parked.mem_file is not None
        assert parked.mem_file.sharing is Sharing.OWN
        await host.call(RestoreRequest(instance=vm.id))
        assert (await host.call(ExecRequest(instance=vm.id, argv=["echo", "back"]))).stdout == b"back\n"
    finally:
        await host.call(RmRequest(instance=vm.id))


async def test_the_first_command_of_a_fork_reads_no_library(host: AsyncHost, image: str) -> None:
    """A capture has the dynamic loader and the C library in its page cache, though no program has run before it."""
    machine = await host.run(image, name="idle")
    await machine.standby()
    async with machine.fork(1, atomic=True) as (fork,):

        async def read_bytes() -> int:
            stats = [(await fork.read_text(f"/sys/block/{disk}/stat")).split() for disk in ("vda", "vdb")]
            return sum(int(stat[2]) for stat in stats) * 512  # a sector is 512 bytes, whatever the disk says

        before = await read_bytes()
        await fork.exec(["true"])
        read = await read_bytes() - before
    await machine.rm()
    assert 0 < read < MIB / 4  # `true` itself


async def test_pages_of_a_fork_survive_its_capture(host: AsyncHost, template: Instance, vm: Instance) -> None:
    """A fork keeps 32 MiB of dirty pages through standby and restore, its forks have them too, and
    the base is unchanged.
    """
    base = mem_file(host, template)
    before = await digest(base)
    await ask(host, vm, HOLD.format(salt=7))
    held = await ask(host, vm, SUM)
    done = await host.call(StandbyRequest(instance=vm.id))
    parked, report = done.instance, done.capture
    assert report.dirty_bytes >= 32 * MIB
    assert parked.state is State.STANDBY
    assert mem_file(host, vm).stat().st_ino == base.stat().st_ino
    layer = mem_file(host, vm).with_name(directories.LAYERS[0])
    assert layer.stat().st_nlink == 1
    async with (await host.get(parked.id)).fork(2, atomic=True) as grandchildren:
        assert await asyncio.gather(*(ask(host, grandchild, SUM) for grandchild in grandchildren)) == [held, held]
        assert layer.stat().st_nlink == 3
    await host.call(RestoreRequest(instance=parked.id))
    assert await ask(host, vm, SUM) == held
    assert await digest(base) == before


async def test_a_changed_source_leaves_its_forks_alone(host: AsyncHost, vm: Instance) -> None:
    """Forks keep their memory while their source is restored and captured again."""
    await ask(host, vm, HOLD.format(salt=11))
    held = await ask(host, vm, SUM)
    parked = (await host.call(StandbyRequest(instance=vm.id))).instance
    report = await host.call(ForkRequest(instance=parked.id, count=2, atomic=True))
    idle = (await host.call(ForkRequest(instance=parked.id, target=State.STANDBY))).instances[0]
    forks = [*report.instances, idle]
    try:
        await host.call(RestoreRequest(instance=parked.id))
        await ask(host, vm, "os.held.fill(0)")
        await host.call(StandbyRequest(instance=vm.id))
        await host.call(RestoreRequest(instance=vm.id))
        await host.call(RestoreRequest(instance=idle.id))
        assert [await ask(host, fork, SUM) for fork in forks] == [held] * 3
        await host.call(StandbyRequest(instance=forks[0].id))
        await host.call(RestoreRequest(instance=forks[0].id))
        assert await ask(host, forks[0], SUM) == held
    finally:
        await asyncio.gather(*(host.call(RmRequest(instance=fork.id)) for fork in forks))


async def test_disk_and_memory_are_of_one_instant(host: AsyncHost, vm: Instance) -> None:
    """After a capture, a counter in memory and its copy in a synced file differ by one at most."""
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
    started = await host.call(
        ExecRequest(instance=vm.id, argv=["sh", "-c", f"setsid python3 -c '{script}' >/dev/null 2>&1 </dev/null &"])
    )
    assert started.exit_code == 0
    async with asyncio.timeout(30):
        while (await host.call(ExecRequest(instance=vm.id, argv=["test", "-e", "/dev/shm/counter"]))).exit_code:
            pass
    await host.call(StandbyRequest(instance=vm.id))
    async with (await host.get(vm.id)).fork(2, atomic=True) as forks:
        for fork in forks:
            stopped = await host.call(
                ExecRequest(
                    instance=fork.id,
                    argv=["sh", "-c", "kill -STOP $(cat /run/writer); cat /root/counter; echo; cat /dev/shm/counter"],
                )
            )
            on_disk, in_memory = (int(word) for word in stopped.stdout.split())
            assert 0 <= on_disk - in_memory <= 1
