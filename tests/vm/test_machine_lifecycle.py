"""Real machines in all their states; a failure on the way leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import CoppiceError, IntegrityError, NoSpace, NotFound, UsageError, VmmDied
from coppice.model import MIB, Instance, State
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    GetRequest,
    ReadFileRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    StartRequest,
    StopRequest,
    WaitRequest,
    WriteFileRequest,
)
from machines import ask, mem_file, require_sysrq


def traces(host: AsyncHost) -> tuple[set[str], set[str], set[Path]]:
    """Return the traces that instances leave: records, directories, VMM processes."""
    layout = host.local.rooms.layout
    return (
        {instance.id for instance in host.local.rooms.store.instances()},
        {entry.name for entry in layout.instances.iterdir()},
        set(host.local.rooms.drivers.chosen.find_orphans(layout.instances)),
    )


async def test_stop_keeps_the_disk_and_start_boots_it(host: AsyncHost, image: str) -> None:
    """A graceful stop powers the guest off, and the next boot finds its files."""
    vm = await host.call(RunRequest(image=image, command=["sleep", "infinity"], memory_bytes=256 * MIB))
    try:
        await host.call(WriteFileRequest(instance=vm.id, path="/root/kept", data=b"kept"))
        stopped = await host.call(StopRequest(instance=vm.id))
        assert (stopped.state, stopped.exit_reason) == (State.STOPPED, "powered off")
        assert (await host.call(StopRequest(instance=vm.id))).state is State.STOPPED
        await host.call(StartRequest(instance=vm.id))
        assert await host.call(ReadFileRequest(instance=vm.id, path="/root/kept")) == b"kept"
        assert (await host.call(ExecRequest(instance=vm.id, argv=["sh", "-c", "test -w / && mount"]))).exit_code == 0
    finally:
        await host.call(RmRequest(instance=vm.id))


async def test_the_guest_waits_for_no_grace_period(host: AsyncHost, vm: Instance) -> None:
    """Its kernel has taken that word of its command line."""
    found = await host.call(ExecRequest(instance=vm.id, argv=["cat", "/sys/kernel/rcu_expedited"]))
    assert found.stdout == b"1\n"


async def test_a_vmm_killed_from_outside_is_seen(host: AsyncHost, vm: Instance) -> None:
    """A machine whose VMM was killed is Stopped with the reason, and can be started again."""
    assert vm.vmm is not None
    os.kill(vm.vmm.pid, signal.SIGKILL)
    await host.call(WaitRequest(instance=vm.id, deadline_s=10))
    seen = await host.call(GetRequest(instance=vm.id))
    assert seen.state is State.STOPPED
    assert "signal 9" in (seen.exit_reason or "")
    with pytest.raises(CoppiceError):
        await host.call(ExecRequest(instance=vm.id, argv=["true"]))
    await host.call(StartRequest(instance=vm.id))
    assert (await host.call(ExecRequest(instance=vm.id, argv=["echo", "again"]))).stdout == b"again\n"


async def test_a_guest_that_powers_off_is_seen(host: AsyncHost, vm: Instance) -> None:
    """A guest that powers itself off is Stopped."""
    await require_sysrq(host, vm)
    with pytest.raises(CoppiceError):
        await host.call(
            ExecRequest(instance=vm.id, argv=["sh", "-c", "echo o > /proc/sysrq-trigger; sleep 60"], timeout_s=30)
        )
    assert (await host.call(WaitRequest(instance=vm.id, deadline_s=20))).state is State.STOPPED


async def test_memory_too_small_to_boot(host: AsyncHost, image: str) -> None:
    """The error has the kernel's own reason instead of a timeout, and nothing is left."""
    if (await host.kernels.fetch()).modules is None:
        pytest.skip("the kernel has no modules, so its initramfs is small and it boots with 64 MiB")
    before = traces(host)
    with pytest.raises(UsageError, match="memory"):
        await host.call(RunRequest(image=image, memory_bytes=16 * MIB))
    for mib in (64, 80):
        with pytest.raises(VmmDied, match=r"its kernel panicked: .*memory") as caught:
            await host.call(RunRequest(image=image, memory_bytes=mib * MIB))
        assert caught.value.hint == f"it has {mib} MiB of memory: give it more with `--memory`"
    assert traces(host) == before


async def test_unknown_images_and_instances_are_not_found(host: AsyncHost) -> None:
    """An unknown image or instance is NotFound, with exit code 3."""
    for attempt in (
        host.run("no-such-image"),
        host.get("no-such-instance"),
        host.call(ForkRequest(instance="no-such-instance")),
    ):
        with pytest.raises(NotFound) as caught:
            await attempt
        assert caught.value.exit_code == 3


async def test_a_damaged_capture_is_refused(host: AsyncHost, template: Instance) -> None:
    """A truncated vmstate or mem-file is an error, and the template can still be forked."""
    fork = (await host.call(ForkRequest(instance=template.id, target=State.STANDBY))).instances[0]
    vmstate = host.local.rooms.directory(fork.id) / "vmstate"
    whole = vmstate.read_bytes()
    vmstate.unlink()
    vmstate.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(CoppiceError) as caught:
            await host.call(RestoreRequest(instance=fork.id))
        assert caught.value.hint
        memory = mem_file(host, fork)
        if memory.exists():
            memory.unlink()
            memory.write_bytes(b"short")
            with pytest.raises(IntegrityError):
                await host.call(RestoreRequest(instance=fork.id))
    finally:
        await host.call(RmRequest(instance=fork.id))
    async with (await host.get(template.id)).fork(1, atomic=True) as (healthy,):
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


async def test_an_image_that_does_not_fit_leaves_nothing(tiny_disk: Path, tmp_path: Path) -> None:
    """An import on a full disk ends with exit code 5 and a hint, and nothing half-made stays."""
    for name in ("bin", "etc"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root" / "bin" / "large").write_bytes(os.urandom(80 * MIB))
    archive = tmp_path / "root.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "root", arcname=".")
    async with AsyncHost(tiny_disk / "home") as cramped:
        with pytest.raises(NoSpace) as caught:
            await cramped.images.import_("large", archive)
        assert caught.value.exit_code == 5
        assert caught.value.hint
        assert await cramped.images.ls() == []
        assert traces(cramped) == (set(), set(), set())
        assert sum(path.stat().st_size for path in cramped.local.rooms.layout.images.rglob("*") if path.is_file()) < MIB
