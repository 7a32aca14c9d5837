"""On a disk without a free block, instances can be listed and removed, and new work is refused."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import NoSpace
from coppice.model import State
from coppice.requests import ForkRequest, LsRequest, PromoteRequest, RmRequest, SnapshotRequest
from coppice.state.database import Database
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, boot, make
from fakes.rooms import DEADLINES, open_rooms
from fakes.volumes import SIZE, WRITES, got, got_of_volume, put, with_volume

pytestmark = pytest.mark.usefixtures("personality")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system that is small enough to fill."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    with image.open("wb") as file:
        file.truncate(160 << 20)
    run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
    mount.mkdir()
    run("mount", "-o", "loop", str(image), str(mount))
    yield mount
    run("umount", str(mount))


def fill(disk: Path) -> None:
    """Write until no block is free."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        size = 1 << 20
        while True:
            try:
                filler.write(bytes(size))
            except OSError:
                size //= 2
                if size < 512:
                    raise


def host_on(disk: Path, driver: FakeDriver) -> AsyncHost:
    return AsyncHost(disk / "home", driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)


async def test_a_host_on_a_full_disk_can_list_and_remove(small_disk: Path, seed_home: Path, fake_vmm: Path) -> None:
    """No host is open, so SQLite must create its files again, and the removal must be recorded on
    the full disk.
    """
    run("cp", "-a", "--sparse=always", str(seed_home), str(small_disk / "home"))
    driver = FakeDriver(fake_vmm)
    async with host_on(small_disk, driver) as host:
        for name in ("oak", "elm"):
            await make(host, State.STANDBY, name)
        await host.call(PromoteRequest(instance="oak"))
        await host.call(SnapshotRequest(instance="oak", name="kept"))
    fill(small_disk)
    async with host_on(small_disk, driver) as host:
        assert [instance.name for instance in await host.call(LsRequest())] == ["oak", "elm"]
    async with host_on(small_disk, driver) as host:
        report = await host.verify()
        assert (report.mem_files, report.disks, report.no_space, report.differences) == (2, 3, (), ())
        with pytest.raises(NoSpace):
            await boot(host, "ash")
        await assert_tidy(host, "oak", "elm")
        await host.call(RmRequest(instance="elm"))
        await assert_tidy(host, "oak")
    (small_disk / "filler").unlink()
    async with host_on(small_disk, driver) as host:
        await boot(host, "ash")
        await assert_tidy(host, "oak", "ash")
    await driver.end(small_disk / "home" / "instances")
    assert (small_disk / "home" / "coppice.db-reserve").stat().st_blocks > 0


@pytest.mark.parametrize("reopened", [False, True], ids=["open", "reopened"])
async def test_the_writer_of_a_volume_with_layers_is_removed_on_a_full_disk(
    small_disk: Path, seed_home: Path, fake_vmm: Path, reopened: bool
) -> None:
    """The volume gets its layers by hard links, which need no block, so no data is lost."""
    run("cp", "-a", "--sparse=always", str(seed_home), str(small_disk / "home"))
    driver = FakeDriver(fake_vmm)
    async with contextlib.AsyncExitStack() as opened:
        host = await opened.enter_async_context(host_on(small_disk, driver))
        await host.volumes.create("data", size_bytes=SIZE)
        oak = await with_volume(host, WRITES)
        put(host, oak, "warm")
        clone = ForkRequest(
            instance="oak", names=("elm",), target=State.STOPPED, from_running=True, volume_policy="clone", atomic=True
        )
        await host.call(clone)
        put(host, oak, "later")
        fill(small_disk)
        if reopened:
            await opened.pop_all().aclose()
            host = await opened.enter_async_context(host_on(small_disk, driver))
        await host.call(RmRequest(instance="oak"))
        (elm,) = await assert_tidy(host, "elm")
        volume = (await host.volumes.inspect("data")).volume
        assert volume.layers == ((1,) if driver.capabilities.layer_format else ())
        assert [got_of_volume(host), got(host, elm)] == ["later", "warm"]
        (small_disk / "filler").unlink()
        assert (await host.verify()).differences == ()
        assert got(host, await with_volume(host, WRITES, "ash")) == "later"
    await driver.end(small_disk / "home" / "instances")


def test_a_full_disk_without_a_reserve_is_reported_as_such(small_disk: Path) -> None:
    """The error is NoSpace with a hint, even if only the log's index lacks space."""
    Database(small_disk / "coppice.db").close()
    (small_disk / "coppice.db-reserve").unlink()
    fill(small_disk)
    with pytest.raises(NoSpace, match="no disk space") as caught:
        Database(small_disk / "coppice.db")
    assert caught.value.exit_code == 5
    assert caught.value.hint
