"""Instances of the fake VMM in any state, and what a test asks of a data directory: is it as before, is nothing left behind."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from coppice.disk.atomic import is_temporary
from coppice.host import AsyncHost
from coppice.model import Instance, State
from coppice.store import locks
from coppice.vmm import driver as files
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE

T = TypeVar("T")


async def boot(host: AsyncHost, name: str = "oak", **options: Any) -> Instance:
    """A Running instance."""
    return await host.run(IMAGE, name=name, memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES, **options)


async def make(host: AsyncHost, state: State, name: str = "oak") -> Instance:
    """An instance in that state; the states that pass by are written into the record of a machine that runs."""
    instance = await boot(host, name, start=state is not State.STOPPED)
    if state in (State.STANDBY, State.TEMPLATE):
        instance, _ = await host.standby(instance)
    if state is State.TEMPLATE:
        instance = await host.promote(instance)
    if instance.state is not state:
        instance = msgspec.structs.replace(instance, state=state)
        host.rooms.store.save(instance)
    return instance


def memory_of(host: AsyncHost, instance: Instance) -> Path:
    """The instance's own link to its mem-file."""
    return host.rooms.directory(instance.id) / files.MEMORY


def fingerprint(path: Path) -> tuple[int, int, int, str]:
    """What must never change of a captured file: inode, mode, time of change, content."""
    status = path.stat()
    with path.open("rb") as file:
        return status.st_ino, status.st_mode, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()


async def ask(host: AsyncHost, instance: Instance | str, *argv: str) -> str:
    """What a command in the guest prints; it must succeed."""
    result = await host.exec(instance, argv, timeout_s=20)
    assert result.exit_code == 0, result
    return result.stdout.decode().rstrip("\n")


def snapshot(host: AsyncHost) -> tuple[dict[str, tuple[int, ...]], list[Instance], list[str], list[int]]:
    """Everything that an operation could have changed: files, records, journal, processes."""
    layout = host.rooms.layout
    found: dict[str, tuple[int, ...]] = {}
    for top, directories, names in os.walk(layout.home):
        for name in (*directories, *names):
            path = Path(top, name)
            if not path.name.startswith("coppice.db"):
                status = path.lstat()
                changes = () if path.is_dir() else (status.st_nlink, status.st_size, status.st_mtime_ns)
                found[str(path)] = (status.st_ino, status.st_mode, *changes)
    journal = sorted(entry.operation for entry in host.rooms.store.journal())
    orphans = host.rooms.driver.find_orphans(layout.instances)
    return found, host.rooms.store.instances(), journal, sorted(p.pid for found in orphans.values() for p in found)


async def assert_tidy(host: AsyncHost, *names: str) -> list[Instance]:
    """Exactly these instances are there, each with what is its own, and nothing else is: no file, lock, row or process."""
    layout, store, driver = host.rooms.layout, host.rooms.store, host.rooms.driver
    instances = store.instances()
    assert sorted(instance.name for instance in instances) == sorted(names)
    assert store.journal() == []
    ids = {instance.id for instance in instances}
    assert {path.name for path in layout.instances.iterdir()} == ids
    assert {path.stem for path in layout.locks.iterdir()} <= ids | store.snapshots.ids() | store.volumes.ids()
    assert {path.name for path in layout.volumes.iterdir()} == store.volumes.ids()
    for volume in store.volumes.all():
        assert [path.name for path in layout.volume(volume.id).iterdir()] == ["data.raw"]
        disk = layout.volume_disk(volume.id)
        assert disk.stat().st_nlink == 1 + len(volume.attachments)
        for holder in volume.attachments:
            found = (layout.instance if holder.holder == "instance" else layout.snapshot)(holder.instance_id)
            assert any(path.samefile(disk) for path in found.glob("volume?.raw"))
    assert {path.name for path in layout.snapshots.iterdir()} == store.snapshots.ids()
    for kept in store.snapshots.all():
        with_memory = [files.MEMORY, files.VMSTATE] if kept.mem_file is not None else []
        volumes = [files.VOLUME_DISK.format(number) for number in range(len(kept.machine.volumes))]
        expected = [files.OVERLAY_DISK, files.ROOT_DISK, *with_memory, *volumes]
        present = {path.name for path in layout.snapshot(kept.id).iterdir()}
        assert present == set(expected)
    orphans = await asyncio.to_thread(driver.find_orphans, layout.instances)
    running = {layout.instance(instance.id): instance.vmm for instance in instances if instance.vmm is not None}
    assert {directory: [vmm] for directory, vmm in running.items()} == orphans
    for path in layout.locks.iterdir():
        held = locks.try_lock(path)
        assert held is not None, f"{path} is still held"
        locks.release(held)
    for instance in instances:
        directory = layout.instance(instance.id)
        present = {path.name for path in directory.iterdir()}
        assert not [name for name in present if is_temporary(name)]
        assert not {files.VMSTATE_NEW, "memory.new"} & present
        assert (files.MEMORY in present) == (instance.mem_file is not None)
        assert files.VMSTATE in present or instance.mem_file is None or instance.vmm is not None
        assert (instance.state in (State.RUNNING, State.PAUSED)) == (instance.vmm is not None)
        if instance.state in (State.STANDBY, State.TEMPLATE):
            assert instance.mem_file is not None
        if instance.vmm is None:
            assert files.LIVE_MEMORY not in present
            assert not [name for name in present if name.endswith(".sock")]
    return instances


_cancelled = threading.Event()  # since the latest `cancelled_at` began


async def late_to_thread(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """asyncio.to_thread, but what is at work in a thread when its task is cancelled does its work later than any quick cleanup."""

    begun = threading.Event()

    def run() -> T:
        began_before = not _cancelled.is_set()
        begun.set()
        time.sleep(0.0005)
        if began_before and _cancelled.is_set():
            time.sleep(0.02)
        return function(*args, **kwargs)

    running = asyncio.get_running_loop().run_in_executor(None, run)
    begun.wait(0.05)  # what has not begun can be cancelled after all
    return await running


class CancelledAt(Coroutine[Any, Any, Any]):
    """A coroutine whose task is cancelled at the `nth` time that it waits for anything."""

    def __init__(self, work: Coroutine[Any, Any, Any], nth: int) -> None:
        self._work = work
        self._left = nth

    @property
    def cancelled(self) -> bool:
        """Whether it came so far."""
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
    """Run work, cancelled at its `nth` wait; tell whether it came so far."""
    _cancelled.clear()
    counted = CancelledAt(work, nth)
    outcome = (await asyncio.gather(asyncio.ensure_future(counted), return_exceptions=True))[0]
    if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
        raise outcome
    return counted.cancelled
