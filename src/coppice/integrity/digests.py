"""SHA-256 digests of captured files: missing ones, their recording, and the program that computes
them in the background.

    python -m coppice.integrity.digests HOME LOCK

LOCK is the descriptor of the data directory's `locks`, which the process that starts the program
has flocked: one such program works in a data directory. It holds no other lock while it reads, and
records a digest only for the file that it has read. It may be killed at any time: files without a
digest are found again.

It is a process and not a thread because it runs at idle priority: a starved thread that holds the
interpreter's lock would stop its whole program. The data that it reads stays in the page cache: a
restore or fork soon reads it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coppice.completion import in_thread
from coppice.errors import Busy, CoppiceError, NoSpace, NotFound
from coppice.machine import directory as directories
from coppice.machine import disks
from coppice.memory import memfile
from coppice.model import Instance, MemFile, Snapshot
from coppice.state import locks
from coppice.state.layout import Layout
from coppice.state.store import Store
from coppice.vmm import driver as files
from coppice.vmm.process import own_process

_RECORD_WITHIN_S = 60.0
_IOPRIO_SET = 251  # ioprio_set(2) on x86-64: glibc has no function for it
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_CLASS_IDLE = 3
_IOPRIO_CLASS_SHIFT = 13


@dataclass(frozen=True)
class Holder:
    """An instance or snapshot with captured files."""

    record: Instance | Snapshot
    directory: Path

    @property
    def memory(self) -> list[tuple[Path, MemFile]]:
        """The files of the captured memory, with what was recorded of each; empty if there is none."""
        capture = self.record.capture
        return (
            list(zip(directories.memory_paths(self.directory, capture), capture.memory, strict=True)) if capture else []
        )


def holders(layout: Layout, store: Store) -> list[Holder]:
    """Return all instances and snapshots that no operation is changing. Blocks."""
    busy = {entry.instance for entry in store.journal()}
    return [
        *(Holder(each, layout.instance(each.id)) for each in store.instances() if each.id not in busy),
        *(Holder(each, layout.snapshot(each.id)) for each in store.snapshots.all()),
    ]


def still_there(store: Store, record: Instance | Snapshot) -> bool:
    """Return whether the holder still has the memory that was listed; else the result is not about
    it. Blocks.
    """
    try:
        now = _now(store, record)
    except NotFound:
        return False
    return (now.capture and now.capture.inodes) == (record.capture and record.capture.inodes)


def _now(store: Store, record: Instance | Snapshot) -> Instance | Snapshot:
    return store.snapshots.get(record.id) if isinstance(record, Snapshot) else store.get(record.id)


async def record(
    layout: Layout, store: Store, holder: Instance | Snapshot, inode: int, digest: str, *, deadline_s: float
) -> bool:
    """Record the digest of a file of a memory while its holder is locked; return whether that
    succeeded. Another run records it if the holder is busy or the disk is full.
    """
    lock = layout.lock(holder.id)
    try:
        async with locks.hold(lock, shared=True, deadline_s=deadline_s, what=holder.name):
            if isinstance(holder, Snapshot):
                recorded = await in_thread(store.snapshots.record_sha256, holder.id, memory=(inode, digest))
            else:
                recorded = await in_thread(store.record_sha256, holder.id, inode, digest)
            if not recorded:
                try:
                    await in_thread(_now, store, holder)
                except NotFound:
                    locks.remove(lock)
            return recorded
    except (Busy, NoSpace):
        return False


def lacking(holder: Instance | Snapshot) -> tuple[str, ...]:
    """Return the captured files of a holder that have no digest yet."""
    captured = holder.capture.memory if holder.capture is not None else ()
    names = (files.MEMORY, *directories.LAYERS)
    memory = tuple(names[number] for number, file in enumerate(captured) if file.sha256 is None)
    disk = (files.OVERLAY_DISK,) if isinstance(holder, Snapshot) and holder.disk_sha256 is None else ()
    return memory + disk


def any_lacking(layout: Layout, store: Store) -> bool:
    """Return whether any digest is missing. Blocks."""
    return any(lacking(holder.record) for holder in holders(layout, store))


class Digests:
    """Computes missing digests; each file is tried once."""

    def __init__(self, layout: Layout, store: Store) -> None:
        self._layout = layout
        self._store = store
        self._tried: set[tuple[str, str, int]] = set()
        self._known: dict[tuple[int, int], str] = {}  # by device and inode

    def todo(self) -> list[tuple[Holder, str]]:
        """Return the files without a digest that were not tried yet."""
        self._known = {}
        found = holders(self._layout, self._store)
        for holder in found:
            for path, recorded in holder.memory:
                if recorded.sha256 is not None:
                    with contextlib.suppress(OSError):
                        self._known[_identity(path.lstat())] = recorded.sha256
        return [
            (holder, file)
            for holder in found
            for file in lacking(holder.record)
            if _key(holder, file) not in self._tried
        ]

    async def compute(self) -> None:
        """Compute and record digests until nothing is left to try.

        Files that differ from their record are left to `verify`.
        """
        while todo := self.todo():
            for holder, file in todo:
                self._tried.add(_key(holder, file))
                with contextlib.suppress(CoppiceError, OSError):
                    if file != files.OVERLAY_DISK:
                        await self._memory(holder, *next(each for each in holder.memory if each[0].name == file))
                    elif isinstance(holder.record, Snapshot):
                        self._disk(holder.record, holder.directory)

    async def _memory(self, holder: Holder, path: Path, expected: MemFile) -> None:
        with _opened(path) as descriptor:  # open until it is recorded, so that the inode is not reused
            memfile.check(path, expected)
            identity = _identity(os.fstat(descriptor))
            digest = self._known.get(identity) or _sha256(path, descriptor)
            memfile.check(path, expected)
            if digest is not None and identity == _identity(path.lstat()):
                self._known[identity] = digest
                await record(
                    self._layout, self._store, holder.record, expected.inode, digest, deadline_s=_RECORD_WITHIN_S
                )

    def _disk(self, snapshot: Snapshot, directory: Path) -> None:
        layers, found = snapshot.disk_layers, list[str]()
        if directories.disk_stamp(directory, layers) != snapshot.disk_stamp:
            return
        for path in disks.paths(directory, disks.of(snapshot)):
            with _opened(path) as descriptor:
                digest = _sha256(path, descriptor)
            if digest is None:
                return
            found.append(digest)
        if directories.disk_stamp(directory, layers) == snapshot.disk_stamp:
            self._store.snapshots.record_sha256(snapshot.id, disk=of_disk(found))


def of_disk(of_files: Sequence[str]) -> str:
    """Return the digest of a snapshot's disks: that of a raw file, or one over the digests of all files."""
    return of_files[0] if len(of_files) == 1 else hashlib.sha256(" ".join(of_files).encode()).hexdigest()


def _sha256(path: Path, descriptor: int) -> str | None:
    """Return the digest of a file, or None once the file has no link left."""
    return memfile.sha256(path, cancelled=lambda: os.fstat(descriptor).st_nlink == 0)


def _key(holder: Holder, file: str) -> tuple[str, str, int]:
    return holder.record.id, file, next((known.inode for path, known in holder.memory if path.name == file), 0)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def step_aside(pid: int) -> None:
    """Give a process the lowest CPU and disk priority that this host allows.

    Under SCHED_IDLE it would never finish on a host that is never idle.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, 19)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(
            "19"
        )  # a session is scheduled as one group, which has a nice value of its own: sched(7)
    ctypes.CDLL(None).syscall(_IOPRIO_SET, _IOPRIO_WHO_PROCESS, pid, _IOPRIO_CLASS_IDLE << _IOPRIO_CLASS_SHIFT)


def main(arguments: Sequence[str]) -> None:
    """Compute digests until none is missing.

    If the lock is taken, exit: its holder looks again after releasing it.
    """
    home, lock = Path(arguments[0]), int(arguments[1])
    layout = Layout(home)
    if not layout.database.exists():
        return
    store = Store(layout.database, own_process())
    work = Digests(layout, store)
    try:
        while True:
            asyncio.run(work.compute())
            fcntl.flock(lock, fcntl.LOCK_UN)
            if not work.todo():
                return
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, CoppiceError):  # another one is at work, or the data directory is gone
        return
    finally:
        store.close()


if __name__ == "__main__":
    main(sys.argv[1:])
