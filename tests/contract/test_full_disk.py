"""A disk without a single free block: what is there can be seen and removed, what is new is refused, and nothing is half-made."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coppice.errors import NoSpace
from coppice.host import AsyncHost
from coppice.model import State
from coppice.store.database import Database
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, boot, make
from fakes.rooms import DEADLINES, open_rooms


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, small enough to be filled."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    with image.open("wb") as file:
        file.truncate(160 << 20)
    run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
    mount.mkdir()
    run("mount", "-o", "loop", str(image), str(mount))
    yield mount
    run("umount", str(mount))


def fill(disk: Path) -> None:
    """Take every block that there is."""
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


async def test_a_full_disk_can_be_looked_at_and_made_room_on(small_disk: Path, seed_home: Path, fake_vmm: Path) -> None:
    """No host is open, so SQLite has to make its files anew; and a removal has to be recorded where nothing can be written."""
    run("cp", "-a", "--sparse=always", str(seed_home), str(small_disk / "home"))
    driver = FakeDriver(fake_vmm)
    async with host_on(small_disk, driver) as host:
        for name in ("oak", "elm"):
            await make(host, State.STANDBY, name)
        await host.promote("oak")
    fill(small_disk)
    async with host_on(small_disk, driver) as host:
        assert [instance.name for instance in await host.ls()] == ["oak", "elm"]
    async with host_on(small_disk, driver) as host:
        with pytest.raises(NoSpace):
            await boot(host, "ash")
        await assert_tidy(host, "oak", "elm")
        await host.rm("elm")
        await assert_tidy(host, "oak")
    (small_disk / "filler").unlink()
    async with host_on(small_disk, driver) as host:
        await boot(host, "ash")
        await assert_tidy(host, "oak", "ash")
    await driver.end(small_disk / "home" / "instances")
    assert (small_disk / "home" / "coppice.db-reserve").stat().st_blocks > 0


def test_without_its_reserve_it_says_what_is_the_matter(small_disk: Path) -> None:
    """A full disk is said to be one, also where it is the index of the log that finds no room: exit code 5, and what to do."""
    Database(small_disk / "coppice.db").close()
    (small_disk / "coppice.db-reserve").unlink()
    fill(small_disk)
    with pytest.raises(NoSpace, match="no space") as caught:
        Database(small_disk / "coppice.db")
    assert caught.value.exit_code == 5
    assert caught.value.hint
