"""Recovery of volumes: an interrupted creation or removal is cleaned up, complete volumes keep
their data, and gc tells them apart.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.model import MIB, State, VolumeMount
from coppice.names import new_id
from coppice.requests import LsRequest, RmRequest, StopRequest
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from fakes.hosting import assert_tidy, boot

SIZE = 16 * MIB
MOUNT = VolumeMount(volume="data", mount_path="/data")


@pytest.mark.parametrize("came", ["record", "directory", "half a disk", "disk"])
async def test_an_interrupted_creation_is_removed(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, came: str
) -> None:
    """Until recovery, no operation finds the volume.

    Then it is removed at any step, and its name is free.
    """
    other = await fake_host.volumes.create("other", size_bytes=SIZE)
    half = msgspec.structs.replace(other, id=new_id(), name="data")
    dead_store.volumes.create(half, JournalOperation.VOLUME, lambda: None)
    layout = fake_host.local.rooms.layout
    if came != "record":
        layout.volume(half.id).mkdir()
    if came == "half a disk":
        (layout.volume(half.id) / ".data.raw.0123456789ab.tmp").write_bytes(b"half")
    if came == "disk":
        shutil.copy(layout.volume_disk(other.id), layout.volume_disk(half.id))
    assert [found.name for found in await fake_host.volumes.ls()] == ["other"]
    with pytest.raises(Exception, match="there is no volume 'data'"):
        await boot(fake_host, volumes=[MOUNT])
    assert (await fake_host.gc()).removed == ()
    assert not layout.volume(half.id).exists()  # gc recovers first
    async with make_host() as next_host:
        await assert_tidy(next_host)
        assert await next_host.volumes.ls() == [other]
        await next_host.volumes.create("data", size_bytes=SIZE)


@pytest.mark.parametrize("came", ["begun", "renamed", "removed"])
async def test_an_interrupted_removal_is_finished(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, came: str
) -> None:
    """A partially removed volume is never found or attached."""
    data = await fake_host.volumes.create("data", size_bytes=SIZE)
    dead_store.volumes.begin_removal(data, JournalOperation.VOLUME_REMOVE)
    directory = fake_host.local.rooms.layout.volume(data.id)
    if came != "begun":
        directory.rename(directory.with_name(f".{data.id}.removed"))
    if came == "removed":
        (directory.with_name(f".{data.id}.removed") / "data.raw").unlink()
    assert await fake_host.volumes.ls() == []
    with pytest.raises(Exception, match="there is no volume 'data'"):
        await boot(fake_host, volumes=[MOUNT])
    async with make_host() as next_host:
        await next_host.gc()
        await assert_tidy(next_host)
        await next_host.volumes.create("data", size_bytes=SIZE)


async def test_an_interrupted_instance_releases_its_volume(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """The record of an instance takes the volume first; the next command releases it."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    oak = await boot(fake_host, volumes=[MOUNT], start=False)
    dead_store.begin(msgspec.structs.replace(oak, state=State.CREATED), JournalOperation.RUN)
    async with make_host() as next_host:
        await assert_tidy(next_host)
        assert (await next_host.volumes.inspect("data")).volume.attachments == ()
        await boot(next_host, volumes=[MOUNT])


async def test_gc_keeps_volumes_and_removes_stray_directories(fake_host: AsyncHost) -> None:
    """A volume without an instance stays, and a record whose file is missing stays.

    Directories without a record are removed.
    """
    data = await fake_host.volumes.create("data", size_bytes=SIZE)
    lost = await fake_host.volumes.create("lost", size_bytes=SIZE)
    layout = fake_host.local.rooms.layout
    shutil.rmtree(layout.volume(lost.id))
    stray, half = layout.volume(new_id()), layout.volumes / f".{new_id()}.removed"
    for path in (stray, half):
        path.mkdir()
        (path / "data.raw").write_bytes(b"x" * 8192)
    # A check clones a disk whose journal is not empty. The old clone is of a killed check, the new
    # one of a check at work.
    left, new = (layout.volume(data.id) / f".data.raw.{digit * 12}.tmp" for digit in "01")
    for path in (left, new):
        path.write_bytes(b"x" * 8192)
    os.utime(left, (0, 0))
    report = await fake_host.gc(dry_run=True)
    assert sorted(report.removed) == sorted(str(path.relative_to(layout.home)) for path in (stray, half, left))
    assert report.bytes_freed == 3 * 8192
    assert stray.exists()
    assert (await fake_host.gc()).removed == report.removed
    assert await fake_host.volumes.ls() == [data, lost]
    assert layout.volume_disk(data.id).exists()
    assert new.exists()
    new.unlink()
    assert [(found.name, found.detail) for found in (await fake_host.verify()).differences] == [
        ("lost", "it is missing")
    ]
    await fake_host.volumes.rm("lost")
    await assert_tidy(fake_host)


HOST_PROCESS = """
import asyncio, sys
from pathlib import Path
from coppice.client import AsyncHost
from coppice.model import MIB, VolumeMount
from fakes.driver import FakeDriver
from fakes.hosting import boot
from fakes.rooms import DEADLINES, open_rooms

async def main(program, home):
    driver = FakeDriver(Path(program))
    async with AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        print("begin", flush=True)
        while True:
            await host.volumes.create("data", size_bytes=16 * MIB)
            for readonly in (False, True):
                mount = VolumeMount(volume="data", mount_path="/data", readonly=readonly)
                oak = host.machine(await boot(host, volumes=[mount]))
                await oak.standby()
                if readonly:
                    for elm in await oak.fork(2, names=["elm"]):
                        await elm.rm()
                await oak.rm()
            await host.volumes.rm("data")

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("after_ms", [0, 9, 21, 40, 70, 110, 160, 230])
async def test_a_host_that_is_killed_at_any_instant_leaves_whole_volumes(
    fake_vmm: Path, fake_home: Path, make_host: HostFactory, after_ms: int
) -> None:
    """After a SIGKILL at any time, the next host finds a whole volume or none, and can remove it.

    A program that is just being started holds its host's locks until its first instruction, and the
    next host leaves these locks alone. A lock file is removed after its record; if the host died
    between the two, gc removes the file.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOST_PROCESS, str(fake_vmm), str(fake_home)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"begin\n"
    await asyncio.sleep(after_ms / 1000)
    process.kill()
    await process.wait()
    async with asyncio.timeout(20):
        while True:
            async with make_host() as host:
                if not host.local.rooms.store.journal():
                    break
    async with make_host() as host:
        await host.gc()
        instances = await host.call(LsRequest())
        await assert_tidy(host, *(vm.name for vm in instances))
        for vm in reversed(instances):
            if vm.state is State.RUNNING:  # the killed process emulated its guest
                await host.call(StopRequest(instance=vm.id, grace_s=0))
            await host.call(RmRequest(instance=vm.id))
        for volume in await host.volumes.ls():
            assert (await host.verify()).differences == ()
            await boot(host, volumes=[MOUNT])
            await host.call(RmRequest(instance="oak"))
            await host.volumes.rm(volume)
        await assert_tidy(host)
