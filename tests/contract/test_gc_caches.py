"""gc --caches removes what can be made again, and keeps what an instance uses or a user added."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import Busy, NotFound
from coppice.model import Instance, State
from coppice.requests import RmRequest
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.vmm.process import own_process
from fakes.hosting import ask, boot, make, snapshot
from fakes.records import OVERLAY_BYTES
from fakes.rooms import IMAGE

FETCHED = "debian-6.1.0-1-cloud-amd64-0123abcd"
BROUGHT = "custom-6.1.0-0123abcd"


def fill(host: AsyncHost) -> list[str]:
    """Fill the caches with unused entries; return the names of those that gc should remove."""
    layout = host.local.rooms.layout
    for key in (FETCHED, BROUGHT):
        (layout.kernels / key).mkdir()
        (layout.kernels / key / "vmlinuz").write_bytes(bytes(8192))
    initramfs = layout.initramfs / "0123.cpio"
    initramfs.write_bytes(bytes(8192))
    linked = layout.initramfs / "4567.cpio"
    linked.write_bytes(bytes(8192))
    (layout.home / "an-instance-s-link").hardlink_to(linked)
    disk = host.local.rooms.overlays.pristine(2 * OVERLAY_BYTES)
    return sorted(str(path.relative_to(layout.home)) for path in (layout.kernels / FETCHED, initramfs, disk))


async def test_caches_are_removed_only_on_request(fake_host: AsyncHost) -> None:
    """The dry run reports the same names.

    A kernel that a user added stays, and so does the empty disk of an instance's size.
    """
    await boot(fake_host)
    expected = fill(fake_host)
    assert (await fake_host.gc()).removed == ()
    before = snapshot(fake_host)
    assert sorted((await fake_host.gc(dry_run=True, caches=True)).removed) == expected
    assert snapshot(fake_host) == before
    report = await fake_host.gc(caches=True)
    assert sorted(report.removed) == expected
    assert report.bytes_freed >= 2 * 8192
    assert (fake_host.local.rooms.layout.kernels / BROUGHT).is_dir()
    assert fake_host.local.rooms.overlays.path(OVERLAY_BYTES).exists()
    assert (await fake_host.gc(caches=True)).removed == ()
    assert await ask(fake_host, "oak", "hostname") == "oak"


async def test_a_removed_cache_entry_is_made_again(fake_host: AsyncHost) -> None:
    """Without instances the empty disk is removed too, and the next run makes it again."""
    pristine = fake_host.local.rooms.overlays.path(OVERLAY_BYTES)
    assert f"overlays/{pristine.name}" in (await fake_host.gc(caches=True)).removed
    assert not pristine.exists()
    await boot(fake_host)
    assert await ask(fake_host, "oak", "hostname") == "oak"


async def test_an_image_without_a_name_goes_with_its_last_instance(fake_host: AsyncHost) -> None:
    """Named images belong to the user.

    An image that lost its name is kept while an instance uses it as its root.
    """
    image = await fake_host.images.inspect(IMAGE)
    await make(fake_host, State.STOPPED)
    database = sqlite3.connect(fake_host.local.rooms.layout.database)
    database.execute("DELETE FROM images WHERE name = ?", (IMAGE,))  # as if another image had taken the name
    database.commit()
    database.close()
    directory = f"images/{image.digest.removeprefix('sha256:')}"
    assert directory not in (await fake_host.gc(caches=True)).removed
    await fake_host.call(RmRequest(instance="oak"))
    assert directory in (await fake_host.gc(caches=True, dry_run=True)).removed
    assert directory in (await fake_host.gc(caches=True)).removed
    assert await fake_host.images.ls() == []


async def test_caches_stay_while_an_operation_is_under_way(
    fake_host: AsyncHost, make_host: HostFactory, fake_home: Path
) -> None:
    """An operation of a living process may be about to link an entry that it found in a cache."""
    expected = fill(fake_host)
    vm = await boot(fake_host)
    store = Store(fake_home / "coppice.db", own_process())
    store.begin(vm, JournalOperation.STANDBY)
    with pytest.raises(Busy, match="under way"):
        await fake_host.gc(caches=True)
    store.save(vm, done=True)
    store.close()
    assert sorted((await fake_host.gc(caches=True)).removed) == expected


@pytest.mark.parametrize("kind", ["overlays", "initramfs"])
async def test_an_operation_that_begins_during_gc_keeps_its_caches(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Another process may begin a run, and find its cache entries, between gc's look at the journal
    and the removal.
    """
    expected = fill(fake_host)
    vm = await boot(fake_host)
    store = fake_host.local.rooms.store
    recorded = store.instances

    def begins() -> list[Instance]:
        found = recorded()
        store.begin(vm, JournalOperation.STANDBY)
        return found

    monkeypatch.setattr(store, "instances", begins)
    removed = (await fake_host.gc(caches=True)).removed
    assert [name for name in removed if name.startswith(kind)] == []
    store.save(vm, done=True)
    monkeypatch.undo()
    assert {name for name in expected if name.startswith(kind)} <= set((await fake_host.gc(caches=True)).removed)


async def test_gc_removes_the_remains_of_a_killed_build(fake_host: AsyncHost) -> None:
    """Content without a committed record belongs to no image, and the next gc removes it."""
    image = await fake_host.images.inspect(IMAGE)
    content = fake_host.local.rooms.images.content
    with content.staging() as stage:
        (stage / "image").mkdir()
        (stage / "image" / "root.img").write_bytes(bytes(8192))
        content.publish(stage / "image", "0" * 64)  # killed before the record
    assert [found.digest for found in await fake_host.images.ls()] == [image.digest]
    assert (await fake_host.gc()).removed == (f"images/{'0' * 64}",)
    assert (await fake_host.gc()).removed == ()


async def test_an_image_whose_content_is_gone_is_reported(fake_host: AsyncHost) -> None:
    """If its directory was removed by hand, the image cannot be run, but it can be removed."""
    image = await fake_host.images.inspect(IMAGE)
    shutil.rmtree(fake_host.local.rooms.images.root_file(image).parent)
    with pytest.raises(NotFound, match="has been removed"):
        await boot(fake_host)
    await fake_host.images.rm(IMAGE)
    assert await fake_host.images.ls() == []
