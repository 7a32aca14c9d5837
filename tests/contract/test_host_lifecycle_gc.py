"""gc removes what nothing owns, and reports each name and the bytes freed.

It never touches what is in use or being made.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.model import State
from coppice.requests import ForkRequest, RestoreRequest, SnapshotRequest
from coppice.state import locks
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make, memory_of, snapshot
from fakes.records import make_instance


async def leave_behind(host: AsyncHost) -> list[str]:
    """Make one of each kind of garbage; return the names that gc should report."""
    layout = host.local.rooms.layout
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
    host.local.rooms.store.forget(forgotten.id)
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
    gone = [f"process {forgotten.vmm.pid}", f"network of {forgotten.id}"]
    return [*gone, *(str(path.relative_to(layout.home)) for path in paths)]


async def test_gc_removes_what_nothing_owns_and_only_that(fake_host: AsyncHost) -> None:
    """gc reports each thing by name, with the bytes.

    A second run finds nothing, and what is in use is unchanged.
    """
    source = await make(fake_host, State.TEMPLATE)
    await fake_host.call(ForkRequest(instance="oak", names=["elm"]))
    kept = {path: found for path, found in snapshot(fake_host)[0].items() if source.id in path}
    expected = await leave_behind(fake_host)
    with fake_host.local.rooms.overlays.content.staging() as at_work:
        report = await fake_host.gc()
        assert at_work.is_dir()
    assert sorted(report.removed) == sorted(expected)
    assert report.bytes_freed >= 8192
    await assert_tidy(fake_host, "oak", "elm")
    assert {path: found for path, found in snapshot(fake_host)[0].items() if source.id in path} == kept
    assert await ask(fake_host, "elm", "hostname") == "elm"
    assert (await fake_host.gc()).removed == ()


async def test_a_dry_run_says_the_same_and_removes_nothing(fake_host: AsyncHost) -> None:
    """Not even a lock file is made or removed."""
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
    """Another host runs gc at each step of a run and of a fork, and both still succeed."""
    work: list[tuple[str, Callable[[], asyncio.Task[object]]]] = [
        ("boot", lambda: asyncio.create_task(boot(fake_host, "a"))),
        ("identity", lambda: asyncio.create_task(boot(fake_host, "b"))),
        ("manifest", lambda: asyncio.create_task(fake_host.call(ForkRequest(instance="oak", names=["c"])))),
        ("restored", lambda: asyncio.create_task(fake_host.call(ForkRequest(instance="oak", names=["d"])))),
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


async def test_gc_removes_the_copy_of_a_killed_check(fake_host: AsyncHost) -> None:
    """Templates and snapshots are never started, so a copy next to their disk would stay as long as
    they do. A copy of a check at work is kept.
    """
    oak = await make(fake_host, State.TEMPLATE)
    elm = await make(fake_host, State.STOPPED, "elm")
    kept = await fake_host.call(SnapshotRequest(instance="oak", name="kept"))
    layout = fake_host.local.rooms.layout
    left = [
        directory / ".overlay.raw.0123456789ab.tmp"
        for directory in (layout.instance(oak.id), layout.snapshot(kept.id), layout.instance(elm.id))
    ]
    for path in left:
        path.write_bytes(b"x" * 4096)
    expected = sorted(str(path.relative_to(layout.home)) for path in left[:2])
    held = locks.try_lock(layout.lock(elm.id), shared=True)  # as a check of its disk holds it
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
    """The file system's link count is the garbage collector: gc counts no bytes for a file that
    others still share.
    """
    source = await make(fake_host, State.STANDBY)
    (elm,) = (await fake_host.call(ForkRequest(instance="oak", names=["elm"], target=State.STANDBY))).instances
    memory = memory_of(fake_host, elm)
    assert memory.stat().st_nlink == 2
    fake_host.local.rooms.store.forget(source.id)
    report = await fake_host.gc()
    assert f"instances/{source.id}" in report.removed
    assert report.bytes_freed < memory.stat().st_blocks * 512
    assert memory.stat().st_nlink == 1
    await fake_host.call(RestoreRequest(instance="elm"))
