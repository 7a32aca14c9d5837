"""Instances of the fake VMM in any state, and checks that a data directory is unchanged or has no
leftovers.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from coppice import completion
from coppice.client import AsyncHost
from coppice.linux.files import is_temporary
from coppice.machine import directory as directories
from coppice.machine import disks
from coppice.machine.console import SEEN
from coppice.machine.volumes import disk_of
from coppice.model import Instance, Snapshot, State
from coppice.requests import ExecRequest, PromoteRequest, RunRequest, StandbyRequest
from coppice.server.database import DATABASE
from coppice.state import locks
from coppice.vmm import driver as files
from coppice.vmm import starting
from fakes.network import SLOTS, attached
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE

T = TypeVar("T")


async def boot(host: AsyncHost, name: str = "oak", **options: Any) -> Instance:
    """Return a Running instance, by default on the fake network, which leaves files on the host."""
    options = {"network": SLOTS, **options}
    return await host.call(
        RunRequest(image=IMAGE, name=name, memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES, **options)
    )


async def make(host: AsyncHost, state: State, name: str = "oak", **options: Any) -> Instance:
    """Return an instance in a state. Transient states are written into a running machine's
    record.
    """
    instance = await boot(host, name, start=state is not State.STOPPED, **options)
    if state in (State.STANDBY, State.TEMPLATE):
        instance = (await host.call(StandbyRequest(instance=instance.id))).instance
    if state is State.TEMPLATE:
        instance = await host.call(PromoteRequest(instance=instance.id))
    if instance.state is not state:
        instance = msgspec.structs.replace(instance, state=state)
        host.local.rooms.store.save(instance)
    return instance


def memory_of(host: AsyncHost, instance: Instance) -> Path:
    """Return the path of the instance's own link to its mem-file."""
    return host.local.rooms.directory(instance.id) / files.MEMORY


def fingerprint(path: Path) -> tuple[int, int, int, str]:
    """Return the immutable properties of a captured file: inode, mode, time of change, content."""
    status = path.stat()
    with path.open("rb") as file:
        return status.st_ino, status.st_mode, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()


async def ask(host: AsyncHost, instance: Instance | str, *argv: str) -> str:
    """Return the output of a command in the guest, which must succeed."""
    key = instance if isinstance(instance, str) else instance.id
    result = await host.call(ExecRequest(instance=key, argv=argv, timeout_s=20))
    assert result.exit_code == 0, result
    return result.stdout.decode().rstrip("\n")


def snapshot(host: AsyncHost) -> tuple[dict[str, tuple[int, ...]], list[Instance], list[str], list[int]]:
    """Return everything that an operation can change: files, records, journal, processes.

    What a server records for itself is left out: it also records requests that it refuses, and how much of
    each console it has seen.
    """
    layout = host.local.rooms.layout
    found: dict[str, tuple[int, ...]] = {}
    for top, below, names in os.walk(layout.home):
        for name in (*below, *names):
            path = Path(top, name)
            if not path.name.startswith(("coppice.db", DATABASE, SEEN)):
                status = path.lstat()
                changes = () if path.is_dir() else (status.st_nlink, status.st_size, status.st_mtime_ns)
                found[str(path)] = (status.st_ino, status.st_mode, *changes)
    journal = sorted(str(entry.operation) for entry in host.local.rooms.store.journal())
    orphans = host.local.rooms.drivers.chosen.find_orphans(layout.instances)
    return (
        found,
        host.local.rooms.store.instances(),
        journal,
        sorted(p.pid for found in orphans.values() for p in found),
    )


def newest_memory_of(host: AsyncHost, instance: Instance) -> Path:
    """Return the path of the file that the instance's latest capture has made: its topmost layer, or its mem-file."""
    return host.local.rooms.directory(instance.id) / _memory_names(instance)[-1]


def _memory_names(record: Instance | Snapshot) -> list[str]:
    return [path.name for path in directories.memory_paths(Path(), record.capture)] if record.capture else []


def _disk_names(record: Instance | Snapshot) -> list[str]:
    return [path.name for path in disks.paths(Path(), disks.of(record))]


def _readonly_names(record: Instance | Snapshot) -> list[str]:
    volumes = enumerate(record.machine.volumes)
    return [files.VOLUME_DISK.format(number) for number, volume in volumes if volume.readonly]


async def assert_tidy(host: AsyncHost, *names: str) -> list[Instance]:
    """Assert that exactly these instances exist, each complete, with no other file, lock, row or
    process.
    """
    layout, store, driver = host.local.rooms.layout, host.local.rooms.store, host.local.rooms.drivers.chosen
    instances = store.instances()
    assert sorted(instance.name for instance in instances) == sorted(names)
    assert store.journal() == []
    ids = {instance.id for instance in instances}
    assert store.ids() == ids, "a stem instance is left"
    assert {path.name for path in layout.instances.iterdir()} == ids
    assert {path.stem for path in layout.locks.iterdir()} <= ids | store.snapshots.ids() | store.volumes.ids()
    assert {path.name for path in layout.volumes.iterdir()} == store.volumes.ids()
    for volume in store.volumes.all():
        assert sorted(path.name for path in layout.volume(volume.id).iterdir()) == sorted(disk_of(volume).files)
        data = layout.volume_disk(volume.id)
        assert data.stat().st_nlink >= 1 + len(volume.attachments)
        for holder in volume.attachments:
            found = (layout.instance if holder.holder == "instance" else layout.snapshot)(holder.instance_id)
            assert any(path.samefile(data) for path in found.glob("volume?.raw"))
    assert {path.name for path in layout.snapshots.iterdir()} == store.snapshots.ids()
    for kept in store.snapshots.all():
        with_memory = [*_memory_names(kept), files.VMSTATE] if kept.mem_file is not None else []
        expected = [*_disk_names(kept), files.ROOT_DISK, *with_memory, *_readonly_names(kept)]
        present = {path.name for path in layout.snapshot(kept.id).iterdir()}
        assert present == set(expected)
    orphans = await asyncio.to_thread(driver.find_orphans, layout.instances)
    running = {layout.instance(instance.id): instance.vmm for instance in instances if instance.vmm is not None}
    assert {directory: [vmm] for directory, vmm in running.items()} == orphans
    with_slots = {each.id for each in instances if each.vmm is not None and each.machine.network == SLOTS}
    assert attached(layout.home) == with_slots
    for path in layout.locks.iterdir():
        # A process that was just killed, or a child between its fork and its exec, still has a lock for a moment.
        async with locks.hold(path, deadline_s=20, what=f"{path}, which should be free,"):
            pass
    for instance in instances:
        directory = layout.instance(instance.id)
        present = {path.name for path in directory.iterdir()}
        assert not [name for name in present if is_temporary(name)]
        assert not {files.VMSTATE_NEW, files.MEMORY_NEW} & present
        assert present & {files.MEMORY, *directories.LAYERS} == set(_memory_names(instance))
        assert disks.names_in(directory) == sorted([*_disk_names(instance), *_readonly_names(instance)])
        assert files.VMSTATE in present or instance.mem_file is None or instance.vmm is not None
        assert (instance.state in (State.RUNNING, State.PAUSED)) == (instance.vmm is not None)
        if instance.state in (State.STANDBY, State.TEMPLATE):
            assert instance.mem_file is not None
        if instance.vmm is None:
            assert files.LIVE_MEMORY not in present
            assert not [name for name in present if name.endswith(".sock")]
    return instances


_cancelled = threading.Event()  # since the latest `cancelled_at` began


def _late(function: Callable[[], T]) -> Callable[[], T]:
    """Return blocking work that, if its caller is cancelled, ends after any quick cleanup."""

    def run() -> T:
        began_before = not _cancelled.is_set()
        time.sleep(0.0005)
        if began_before and _cancelled.is_set():
            time.sleep(0.02)
        return function()

    return run


async def late_to_thread(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Like asyncio.to_thread, but a cancelled call finishes its work after any quick cleanup."""
    return await asyncio.get_running_loop().run_in_executor(None, _late(partial(function, *args, **kwargs)))


def make_threads_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all blocking work late, as `late_to_thread` does."""
    submit = completion.submit
    for module in (completion, starting):
        monkeypatch.setattr(module, "submit", lambda work, **options: submit(_late(work), **options))
    monkeypatch.setattr(asyncio, "to_thread", late_to_thread)


class CancelledAt(Coroutine[Any, Any, Any]):
    """A coroutine whose task is cancelled at its `nth` wait."""

    def __init__(self, work: Coroutine[Any, Any, Any], nth: int) -> None:
        self._work = work
        self._left = nth

    @property
    def cancelled(self) -> bool:
        """Whether the coroutine reached that wait."""
        return self._left <= 0

    def _count(self, waits_for: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            task = asyncio.current_task()
            assert task is not None
            _cancelled.set()
            task.cancel()
        return waits_for

    def send(self, value: Any) -> Any:
        return self._count(self._work.send(value))

    def throw(self, *error: Any) -> Any:
        return self._count(self._work.throw(*error))

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._work.__await__()


async def cancelled_at(work: Coroutine[Any, Any, Any], nth: int) -> bool:
    """Run work, cancelled at its `nth` wait; return whether it reached that wait."""
    _cancelled.clear()
    counted = CancelledAt(work, nth)
    outcome = (await asyncio.gather(asyncio.ensure_future(counted), return_exceptions=True))[0]
    if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
        raise outcome
    return counted.cancelled
