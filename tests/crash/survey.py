"""Check a data directory after a host process was killed. If possible, the checks do not use
Coppice's own code.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import subprocess
from collections import Counter
from pathlib import Path

from coppice.client import AsyncHost
from coppice.linux.clone import clone_file
from coppice.machine.disk import flat
from coppice.machine.volumes import disk_of
from coppice.model import PAGE_SIZE, Instance, State, Volume
from coppice.requests import RestoreRequest
from crash.kinds import Kind
from crash.operation import SEED, STUMP, Operation
from fakes.hosting import assert_tidy, memory_of
from remains import end, tools_left, working_below

_ZEROS = bytes(PAGE_SIZE)


def assert_links(host: AsyncHost) -> None:
    """Assert that each file of a captured memory has exactly one link per recorded holder."""
    layout, store = host.local.rooms.layout, host.local.rooms.store
    holders = [(layout.instance(vm.id), vm.capture) for vm in store.instances()]
    holders += [(layout.snapshot(kept.id), kept.capture) for kept in store.snapshots.all()]
    recorded: Counter[int] = Counter()
    links: dict[int, int] = {}
    for directory, capture in holders:
        files = capture.memory if capture is not None else ()
        expected = dict(zip(["memory", *(f"memory.{number}" for number in range(1, len(files)))], files, strict=False))
        present = {path.name for path in directory.glob("memory*")} - {"memory.live"}
        assert present == expected.keys(), f"{directory} and its record differ"
        for name, file in expected.items():
            status = (directory / name).stat()
            assert status.st_ino == file.inode
            recorded[status.st_ino] += 1
            links[status.st_ino] = status.st_nlink
    assert links == dict(recorded), f"{links} links, {dict(recorded)} holders"


async def assert_no_tools(home: Path) -> None:
    """Assert that no tool works on a data directory, and end those that do, so that the next check is its own."""
    left = await asyncio.to_thread(tools_left, home.resolve())
    await asyncio.to_thread(end, left)
    assert left == {}, f"tools {left}"


Mark = tuple[int, int, int, str]


def mark_of(path: Path) -> Mark:
    """Return the immutable properties of a captured file: inode, mode, time of change, and a digest
    of its pages that are not zero, which does not read holes.
    """
    status = path.stat()
    digest = hashlib.sha256(str(status.st_size).encode())
    with path.open("rb", buffering=0) as file:
        end = 0
        while end < status.st_size:
            try:
                at = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # only a hole is left
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            for offset in range(at, end, PAGE_SIZE):
                if (page := os.pread(file.fileno(), PAGE_SIZE, offset)) != _ZEROS:
                    digest.update(b"%d " % offset + page)
    return status.st_ino, status.st_mode, status.st_mtime_ns, digest.hexdigest()


async def survey(host: AsyncHost, kind: Kind, operation: Operation, stump: Mark) -> dict[str, str]:
    """Assert all invariants on a host that has just opened the data directory; return states by
    name.
    """
    recorded = {vm.name: vm for vm in host.local.rooms.store.instances() if vm.name != STUMP}
    assert recorded.keys() <= operation.after.keys(), f"unexpected machines: {recorded.keys() - operation.after.keys()}"
    for name, may_be in operation.after.items():
        state = recorded[name].state if name in recorded else None
        assert state in may_be, f"{name} is {state}, {recorded[name].exit_reason if name in recorded else ''}"
    snapshots = {kept.name for kept in host.local.rooms.store.snapshots.all()} - {SEED}
    assert operation.snapshots <= snapshots <= operation.snapshots | operation.may_have
    volumes = {each.name: each for each in host.local.rooms.store.volumes.all()}
    assert operation.volumes <= volumes.keys() <= operation.volumes | operation.may_have_volumes

    await assert_tidy(host, STUMP, *recorded)
    running = {vm.id: {vm.vmm.pid} for vm in recorded.values() if vm.vmm is not None}
    working = working_below(host.local.rooms.layout.instances.resolve())
    assert working == running, f"processes {working}, recorded {running}"
    await assert_no_tools(host.local.rooms.layout.home)
    assert_links(host)
    (template,) = [vm for vm in host.local.rooms.store.instances() if vm.name == STUMP]
    assert template.state is State.TEMPLATE
    assert mark_of(memory_of(host, template)) == stump

    for vm in recorded.values():
        await _comes_to_life(host, kind, vm, operation)
    for each in volumes.values():
        if not each.attachments:
            await asyncio.to_thread(_assert_sound, host, each)
    collected = await host.gc(dry_run=True)
    assert collected.removed == (), f"gc finds {collected.removed}"
    assert working_below(host.local.rooms.layout.instances.resolve()).keys() <= {vm.id for vm in recorded.values()}
    return {name: vm.state.value for name, vm in recorded.items()}


async def _comes_to_life(host: AsyncHost, kind: Kind, vm: Instance, operation: Operation) -> None:
    """Assert that a machine answers as itself: at once, after a restore, or as a fork of a
    template.
    """
    knows = (operation.memory, operation.disk)
    if vm.state is State.TEMPLATE:
        async with (await host.get(vm.id)).fork(1, atomic=True) as (fork,):
            assert await kind.answer(host, fork.record) == (fork.name, *knows)
        return
    if vm.state is State.STANDBY:
        await host.call(RestoreRequest(instance=vm.id))
    if vm.state is not State.STOPPED:
        assert await kind.answer(host, vm) == (vm.hostname, *knows)
        for disk in vm.machine.volumes:
            assert await kind.has_mounted(host, vm, disk.mount_path), f"{disk.volume_name} is not mounted"
            if operation.volume:
                assert await kind.text_on(host, vm, disk.mount_path) == operation.volume


def _assert_sound(host: AsyncHost, volume: Volume) -> None:
    """Assert that an unattached volume's file system is intact, after a journal replay if it needs
    one. Forks may share its files, so a copy is checked.
    """
    rooms = host.local.rooms
    driver = rooms.drivers.named(volume.driver) if volume.driver else rooms.drivers.chosen
    copy = rooms.layout.home.parent / "sound.raw"
    with flat(rooms.layout.volume(volume.id), disk_of(volume), driver) as whole:
        clone_file(whole, copy, sync=False)
    checked = subprocess.run(
        ["e2fsck", "-f", "-p", str(copy)], capture_output=True, check=False, timeout=60
    )  # 0: clean; 1: its journal was replayed
    copy.unlink()
    assert checked.returncode in (0, 1), checked
