"""SHA-256 digests of what was captured: who lacks one, how one is recorded, and the program that computes them in the background.

    python -m coppice.instance.digests HOME LOCK

LOCK is the descriptor of the data directory's `locks`, flocked by whoever started the program: one at a time works in a data directory. It holds no
other lock while it reads; it records a digest only for the file that it has read, and may be killed at any time: what has no digest yet is found again.

It is a process and not a thread, since it runs only where nobody else wants to: a thread that is not let run while it has the interpreter's lock would
stop its program. What it reads stays in the page cache: a capture is read again soon, by what is restored or forked from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coppice.completion import in_thread
from coppice.errors import Busy, CoppiceError, NotFound
from coppice.instance import directory as directories
from coppice.memory import memfile
from coppice.model import Instance, MemFile, Snapshot
from coppice.store import locks
from coppice.store.layout import Layout
from coppice.store.store import Store
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
    def mem_file(self) -> MemFile | None:
        return self.record.mem_file


def holders(layout: Layout, store: Store) -> list[Holder]:
    """All instances and snapshots that no operation is at work on. Blocks."""
    busy = {entry.instance for entry in store.journal()}
    return [
        *(Holder(each, layout.instance(each.id)) for each in store.instances() if each.id not in busy),
        *(Holder(each, layout.snapshot(each.id)) for each in store.snapshots.all()),
    ]


def still_there(store: Store, record: Instance | Snapshot) -> bool:
    """Whether the holder has the same mem-file as when it was listed: else what was found is not about it. Blocks."""
    try:
        now = _now(store, record)
    except NotFound:
        return False
    return (now.mem_file and now.mem_file.inode) == (record.mem_file and record.mem_file.inode)


def _now(store: Store, record: Instance | Snapshot) -> Instance | Snapshot:
    return store.snapshots.get(record.id) if isinstance(record, Snapshot) else store.get(record.id)


async def record(
    layout: Layout, store: Store, holder: Instance | Snapshot, inode: int, digest: str, *, deadline_s: float
) -> bool:
    """Record the digest of a mem-file while nobody changes its holder; tell whether that could be."""
    lock = layout.lock(holder.id)
    try:
        async with locks.hold(lock, shared=True, deadline_s=deadline_s, what=holder.name):
            if isinstance(holder, Snapshot):
                recorded = await in_thread(store.snapshots.record_sha256, holder.id, memory=digest)
            else:
                recorded = await in_thread(store.record_sha256, holder.id, inode, digest)
            if not recorded:
                try:
                    await in_thread(_now, store, holder)
                except NotFound:
                    lock.unlink(missing_ok=True)  # removed meanwhile, and taking the lock has made its file again
            return recorded
    except Busy:
        return False


def lacking(holder: Instance | Snapshot) -> tuple[str, ...]:
    """The captured files of a holder that have no digest yet."""
    memory = (files.MEMORY,) if holder.mem_file is not None and holder.mem_file.sha256 is None else ()
    disk = (files.OVERLAY_DISK,) if isinstance(holder, Snapshot) and holder.disk_sha256 is None else ()
    return memory + disk


def any_lacking(layout: Layout, store: Store) -> bool:
    """Whether there is anything to compute. Blocks."""
    return any(lacking(holder.record) for holder in holders(layout, store))


class Digests:
    """Computes what is lacking; each file is tried once."""

    def __init__(self, layout: Layout, store: Store) -> None:
        self._layout = layout
        self._store = store
        self._tried: set[tuple[str, str, int]] = set()
        self._known: dict[tuple[int, int], str] = {}  # by device and inode

    def todo(self) -> list[tuple[Holder, str]]:
        """What is lacking and was not tried yet."""
        self._known = {}
        found = holders(self._layout, self._store)
        for holder in found:
            if holder.mem_file is not None and holder.mem_file.sha256 is not None:
                with contextlib.suppress(OSError):
                    self._known[_identity((holder.directory / files.MEMORY).lstat())] = holder.mem_file.sha256
        return [
            (holder, file)
            for holder in found
            for file in lacking(holder.record)
            if _key(holder, file) not in self._tried
        ]

    async def compute(self) -> None:
        """Compute and record until nothing is left to try. What is not as it was recorded is left to `verify` to name."""
        while todo := self.todo():
            for holder, file in todo:
                self._tried.add(_key(holder, file))
                with contextlib.suppress(CoppiceError, OSError):
                    await (self._memory(holder) if file == files.MEMORY else self._disk(holder))

    async def _memory(self, holder: Holder) -> None:
        path, expected = holder.directory / files.MEMORY, holder.mem_file
        if expected is None:
            return
        with _opened(path) as descriptor:  # until it is recorded: the inode cannot become another file's
            memfile.check(path, expected)
            identity = _identity(os.fstat(descriptor))
            digest = self._known.get(identity) or _sha256(path, descriptor)
            memfile.check(path, expected)
            if digest is not None and identity == _identity(path.lstat()):
                self._known[identity] = digest
                await record(
                    self._layout, self._store, holder.record, expected.inode, digest, deadline_s=_RECORD_WITHIN_S
                )

    async def _disk(self, holder: Holder) -> None:
        path = holder.directory / files.OVERLAY_DISK
        with _opened(path) as descriptor:
            if directories.disk_stamp(holder.directory) != holder.record.disk_stamp:
                return
            digest = _sha256(path, descriptor)
            if digest is not None and directories.disk_stamp(holder.directory) == holder.record.disk_stamp:
                self._store.snapshots.record_sha256(holder.record.id, disk=digest)


def _sha256(path: Path, descriptor: int) -> str | None:
    """The digest of a file, or None once nobody has a link to it any more."""
    return memfile.sha256(path, cancelled=lambda: os.fstat(descriptor).st_nlink == 0)


def _key(holder: Holder, file: str) -> tuple[str, str, int]:
    return holder.record.id, file, holder.mem_file.inode if holder.mem_file is not None else 0


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
    """Give a process the least of the CPU and the disk, as far as this host allows it. Under SCHED_IDLE it would never end on a host that is never idle."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, 19)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(
            "19"
        )  # a session is scheduled as one group, which has a nice value of its own: sched(7)
    ctypes.CDLL(None).syscall(_IOPRIO_SET, _IOPRIO_WHO_PROCESS, pid, _IOPRIO_CLASS_IDLE << _IOPRIO_CLASS_SHIFT)


def main(arguments: Sequence[str]) -> None:
    """Work until nothing is left to do. Whoever finds the lock taken may go: after letting go of it there is another look."""
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
    except (BlockingIOError, CoppiceError):  # another one is at work; or the data directory is gone
        return
    finally:
        store.close()


if __name__ == "__main__":
    main(sys.argv[1:])
