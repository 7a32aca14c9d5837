"""gc: what nothing owns is collected, by name and with its bytes; what is in use, or is just being made, is never touched."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from conftest import HostFactory
from coppice.host import AsyncHost
from coppice.model import State
from coppice.store import locks
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make, memory_of, snapshot
from fakes.records import make_instance


async def leave_behind(host: AsyncHost) -> list[str]:
    """All that gc is for; returns the names that it should report."""
    layout = host.rooms.layout
    forgotten = await boot(host, "forgotten")
    bare = make_instance()
    (layout.instances / bare.id).mkdir()
    (layout.instances / bare.id / "file").write_bytes(b"x" * 8192)
    half = layout.instances / f".{make_instance().id}.removed"
    half.mkdir()
    only_lock = layout.lock(make_instance().id)
    only_lock.touch()
    old = layout.overlays / ".ext4.raw.0123456789ab.tmp"
    old.write_bytes(b"x" * 4096)
    os.utime(old, (time.time() - 7200,) * 2)
    stage = layout.kernels / ".stage-0123456789abcdef"
    stage.mkdir()
    image_half = layout.images / ".ab.removed"
    image_half.mkdir()
    probe = layout.home / ".coppice-doctor-x"
    probe.mkdir()
    os.utime(probe, (time.time() - 7200,) * 2)
    young = layout.overlays / ".ext4.raw.ba9876543210.tmp"
    young.touch()
    host.rooms.store.forget(forgotten.id)
    assert forgotten.vmm is not None
    paths = (
        layout.instances / forgotten.id,
        layout.lock(forgotten.id),
        layout.instances / bare.id,
        half,
        only_lock,
        old,
        stage,
        image_half,
        probe,
    )
    return [f"process {forgotten.vmm.pid}", *(str(path.relative_to(layout.home)) for path in paths)]


async def test_gc_removes_what_nothing_owns_and_only_that(fake_host: AsyncHost) -> None:
    """Each thing by its name, with the bytes; twice finds nothing; what is in use is as before."""
    source = await make(fake_host, State.TEMPLATE)
    await fake_host.fork("oak", names=["elm"])
    kept = {path: found for path, found in snapshot(fake_host)[0].items() if source.id in path}
    expected = await leave_behind(fake_host)
    report = await fake_host.gc()
    assert sorted(report.removed) == sorted(expected)
    assert report.bytes_freed >= 8192
    young = [path.name for path in fake_host.rooms.layout.overlays.iterdir() if path.name.endswith(".tmp")]
    assert young == [".ext4.raw.ba9876543210.tmp"]
    await assert_tidy(fake_host, "oak", "elm")
    assert {path: found for path, found in snapshot(fake_host)[0].items() if source.id in path} == kept
    assert await ask(fake_host, "elm", "hostname") == "elm"
    assert (await fake_host.gc()).removed == ()


async def test_a_dry_run_says_the_same_and_removes_nothing(fake_host: AsyncHost) -> None:
    """Not even a lock file comes or goes."""
    expected = await leave_behind(fake_host)
    before = snapshot(fake_host)
    report = await fake_host.gc(dry_run=True)
    assert report.dry_run
    assert sorted(report.removed) == sorted(expected)
    assert snapshot(fake_host) == before
    assert sorted((await fake_host.gc()).removed) == sorted(expected)


async def test_gc_leaves_alone_what_is_being_made(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """At each step of a run and of a fork another host collects garbage: the instance becomes whole all the same."""
    work: list[tuple[str, Callable[[], asyncio.Task[object]]]] = [
        ("boot", lambda: asyncio.create_task(boot(fake_host, "a"))),
        ("identity", lambda: asyncio.create_task(boot(fake_host, "b"))),
        ("manifest", lambda: asyncio.create_task(fake_host.fork("oak", names=["c"]))),
        ("restored", lambda: asyncio.create_task(fake_host.fork("oak", names=["d"]))),
    ]
    await make(fake_host, State.TEMPLATE)
    async with make_host() as other:
        for step, begin in work:
            gate = driver.faults.hold_at(step)
            task = begin()
            await asyncio.wait_for(gate.reached.wait(), 10)
            assert (await other.gc()).removed == ()
            gate.release.set()
            await task
    await assert_tidy(fake_host, "oak", "a", "b", "c", "d")
    for name in ("a", "b", "c", "d"):
        assert await ask(fake_host, name, "hostname") == name


async def test_what_a_check_was_killed_over_is_collected(fake_host: AsyncHost) -> None:
    """Beside the disk of a template or snapshot, which are never started, it would stay as long as they do; what is at work is left alone."""
    oak = await make(fake_host, State.TEMPLATE)
    elm = await make(fake_host, State.STOPPED, "elm")
    kept = await fake_host.snapshot_create("oak", name="kept")
    layout = fake_host.rooms.layout
    left = [
        directory / ".overlay.raw.0123456789ab.tmp"
        for directory in (layout.instance(oak.id), layout.snapshot(kept.id), layout.instance(elm.id))
    ]
    for path in left:
        path.write_bytes(b"x" * 4096)
    expected = sorted(str(path.relative_to(layout.home)) for path in left[:2])
    held = locks.try_lock(layout.lock(elm.id), shared=True)  # as a check of its disk has it
    assert held is not None
    try:
        assert sorted((await fake_host.gc(dry_run=True)).removed) == expected
        report = await fake_host.gc()
    finally:
        locks.release(held)
    assert sorted(report.removed) == expected
    assert report.bytes_freed == 2 * 4096
    assert [path.exists() for path in left] == [False, False, True]
    assert (await fake_host.gc()).removed == (str(left[2].relative_to(layout.home)),)
    await assert_tidy(fake_host, "oak", "elm")


async def test_memory_is_freed_with_its_last_link(fake_host: AsyncHost) -> None:
    """The file system's link count is the garbage collector: gc reports no bytes for a file that others still share."""
    source = await make(fake_host, State.STANDBY)
    (elm,) = (await fake_host.fork("oak", names=["elm"], target=State.STANDBY)).instances
    memory = memory_of(fake_host, elm)
    assert memory.stat().st_nlink == 2
    fake_host.rooms.store.forget(source.id)
    report = await fake_host.gc()
    assert f"instances/{source.id}" in report.removed
    assert report.bytes_freed < memory.stat().st_blocks * 512
    assert memory.stat().st_nlink == 1
    await fake_host.restore("elm")
