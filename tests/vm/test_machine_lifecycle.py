"""Real machines through their states, and what is left when something goes wrong on the way: nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.errors import CoppiceError, IntegrityError, NoSpace, NotFound, UsageError, VmmDied
from coppice.host import AsyncHost
from coppice.model import MIB, Instance, State
from machines import ask, mem_file


def traces(host: AsyncHost) -> tuple[set[str], set[str], set[Path]]:
    """What an instance may leave: records, directories, VMM processes."""
    layout = host.rooms.layout
    return (
        {instance.id for instance in host.rooms.store.instances()},
        {entry.name for entry in layout.instances.iterdir()},
        set(host.rooms.driver.find_orphans(layout.instances)),
    )


async def test_stop_keeps_the_disk_and_start_boots_it(host: AsyncHost, image: str) -> None:
    """A graceful stop powers the guest off; its files are there after the next boot, its memory is not."""
    vm = await host.run(image, ["sleep", "infinity"], memory_bytes=256 * MIB)
    try:
        await host.write_file(vm, "/root/kept", b"kept")
        stopped = await host.stop(vm)
        assert (stopped.state, stopped.exit_reason) == (State.STOPPED, "powered off")
        assert (await host.stop(vm)).state is State.STOPPED
        await host.start(vm)
        assert await host.read_file(vm, "/root/kept") == b"kept"
        assert (await host.exec(vm, ["sh", "-c", "test -w / && mount"])).exit_code == 0
    finally:
        await host.rm(vm)


async def test_a_vmm_killed_from_outside_is_seen(host: AsyncHost, vm: Instance) -> None:
    """A machine whose VMM somebody killed is shown Stopped, with the reason, and can be started again."""
    assert vm.vmm is not None
    os.kill(vm.vmm.pid, signal.SIGKILL)
    await host.wait(vm, deadline_s=10)
    seen = await host.get(vm)
    assert seen.state is State.STOPPED
    assert "signal 9" in (seen.exit_reason or "")
    with pytest.raises(CoppiceError):
        await host.exec(vm, ["true"])
    await host.start(vm)
    assert (await host.exec(vm, ["echo", "again"])).stdout == b"again\n"


async def test_a_guest_that_powers_off_is_seen(host: AsyncHost, vm: Instance) -> None:
    """A guest that ends by itself is Stopped, and no process is left."""
    with pytest.raises(CoppiceError):
        await host.exec(vm, ["sh", "-c", "echo o > /proc/sysrq-trigger; sleep 60"], timeout_s=30)
    assert (await host.wait(vm, deadline_s=20)).state is State.STOPPED


async def test_memory_too_small_to_boot(host: AsyncHost, image: str) -> None:
    """A machine that cannot boot in its memory ends with its kernel's own reason, not with a deadline; and it leaves nothing."""
    before = traces(host)
    with pytest.raises(UsageError, match="memory"):
        await host.run(image, memory_bytes=16 * MIB)
    for mib in (64, 80):
        with pytest.raises(VmmDied, match=r"its kernel panicked: .*memory") as caught:
            await host.run(image, memory_bytes=mib * MIB)
        assert caught.value.hint == f"it has {mib} MiB of memory: give it more"
    assert traces(host) == before


async def test_unknown_things(host: AsyncHost) -> None:
    """An unknown image, instance or kernel is NotFound, exit code 3."""
    for attempt in (host.run("no-such-image"), host.get("no-such-instance"), host.fork("no-such-instance")):
        with pytest.raises(NotFound) as caught:
            await attempt
        assert caught.value.exit_code == 3


async def test_a_damaged_capture_is_refused(host: AsyncHost, template: Instance) -> None:
    """A truncated mem-file or vmstate is an error that names it; no VMM is left, and siblings go on."""
    fork = (await host.fork(template, target=State.STANDBY)).instances[0]
    vmstate = host.rooms.directory(fork.id) / "vmstate"
    whole = vmstate.read_bytes()
    vmstate.unlink()
    vmstate.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(CoppiceError) as caught:
            await host.restore(fork)
        assert caught.value.hint
        memory = mem_file(host, fork)
        if memory.exists():
            memory.unlink()
            memory.write_bytes(b"short")
            with pytest.raises(IntegrityError):
                await host.restore(fork)
    finally:
        await host.rm(fork)
    async with host.forks(template, 1) as (healthy,):
        assert await ask(host, healthy, "1 + 2") == "3"


@pytest.fixture
async def tiny_disk(tmp_path: Path) -> AsyncIterator[Path]:
    """A file system of 64 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk))
    assert await mount.wait() == 0
    yield disk
    unmount = await asyncio.create_subprocess_exec("umount", str(disk))
    assert await unmount.wait() == 0


async def test_disk_full(tiny_disk: Path, tmp_path: Path) -> None:
    """An image that does not fit: exit code 5, what to do next, and nothing half-made stays."""
    for name in ("bin", "etc"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root" / "bin" / "large").write_bytes(os.urandom(80 * MIB))
    archive = tmp_path / "root.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "root", arcname=".")
    async with AsyncHost(tiny_disk / "home") as cramped:
        with pytest.raises(NoSpace) as caught:
            await cramped.image_import("large", archive)
        assert caught.value.exit_code == 5
        assert caught.value.hint
        assert await cramped.image_ls() == []
        assert traces(cramped) == (set(), set(), set())
        assert sum(path.stat().st_size for path in cramped.rooms.layout.images.rglob("*") if path.is_file()) < MIB
