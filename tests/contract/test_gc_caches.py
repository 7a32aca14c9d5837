"""gc --caches: what can be had again goes, and what an instance uses, or what somebody brought, stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.errors import Busy
from coppice.host import AsyncHost
from coppice.model import State
from coppice.store.store import Store
from coppice.vmm.process import own_process
from fakes.hosting import ask, boot, make, snapshot
from fakes.records import OVERLAY_BYTES
from fakes.rooms import IMAGE

FETCHED = "debian-6.1.0-1-cloud-amd64-0123abcd"
BROUGHT = "custom-6.1.0-0123abcd"


def fill(host: AsyncHost) -> list[str]:
    """Caches that nothing uses; returns their names."""
    layout = host.rooms.layout
    for key in (FETCHED, BROUGHT):
        (layout.kernels / key).mkdir()
        (layout.kernels / key / "vmlinuz").write_bytes(bytes(8192))
    initramfs = layout.initramfs / "0123.cpio"
    initramfs.write_bytes(bytes(8192))
    linked = layout.initramfs / "4567.cpio"
    linked.write_bytes(bytes(8192))
    (layout.home / "an-instance-s-link").hardlink_to(linked)
    disk = host.rooms.overlays.pristine(2 * OVERLAY_BYTES)
    return sorted(str(path.relative_to(layout.home)) for path in (layout.kernels / FETCHED, initramfs, disk))


async def test_caches_go_only_when_they_are_asked_for(fake_host: AsyncHost) -> None:
    """The dry run says the same; a kernel that somebody added, and the empty disk of an instance's size, stay."""
    await boot(fake_host)
    expected = fill(fake_host)
    assert (await fake_host.gc()).removed == ()
    before = snapshot(fake_host)
    assert sorted((await fake_host.gc(dry_run=True, caches=True)).removed) == expected
    assert snapshot(fake_host) == before
    report = await fake_host.gc(caches=True)
    assert sorted(report.removed) == expected
    assert report.bytes_freed >= 2 * 8192
    assert (fake_host.rooms.layout.kernels / BROUGHT).is_dir()
    assert fake_host.rooms.overlays.path(OVERLAY_BYTES).exists()
    assert (await fake_host.gc(caches=True)).removed == ()
    assert await ask(fake_host, "oak", "hostname") == "oak"


async def test_what_was_removed_is_made_again(fake_host: AsyncHost) -> None:
    """Without an instance the empty disk goes too; the next run makes it anew."""
    pristine = fake_host.rooms.overlays.path(OVERLAY_BYTES)
    assert f"overlays/{pristine.name}" in (await fake_host.gc(caches=True)).removed
    assert not pristine.exists()
    await boot(fake_host)
    assert await ask(fake_host, "oak", "hostname") == "oak"


async def test_an_image_without_a_name_goes_with_its_last_instance(fake_host: AsyncHost) -> None:
    """Named images are the user's; one that lost its name is kept while an instance has it as its root."""
    image = await fake_host.image_inspect(IMAGE)
    await make(fake_host, State.STOPPED)
    (name,) = fake_host.rooms.images.root.joinpath("names").glob("*.json")
    name.unlink()  # as if another image had taken the name
    directory = f"images/{image.digest.removeprefix('sha256:')}"
    assert directory not in (await fake_host.gc(caches=True)).removed
    await fake_host.rm("oak")
    assert directory in (await fake_host.gc(caches=True, dry_run=True)).removed
    assert directory in (await fake_host.gc(caches=True)).removed
    assert await fake_host.image_ls() == []


async def test_caches_stay_while_something_is_under_way(
    fake_host: AsyncHost, make_host: HostFactory, fake_home: Path
) -> None:
    """An operation of a living process may be about to link what it found in a cache."""
    expected = fill(fake_host)
    vm = await boot(fake_host)
    store = Store(fake_home / "coppice.db", own_process())
    store.begin(vm, "standby")
    with pytest.raises(Busy, match="under way"):
        await fake_host.gc(caches=True)
    store.save(vm, done=True)
    store.close()
    assert sorted((await fake_host.gc(caches=True)).removed) == expected
