"""Housekeeping: gc removes what nothing owns, and on demand what is only kept to save time.

What a process that was killed leaves has a name that nothing is ever found by, or an id that no record has. All else is somebody's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from coppice.completion import in_thread
from coppice.disk.atomic import is_temporary
from coppice.errors import Busy, InUse, NotFound
from coppice.host.base import HostBase
from coppice.instance import destroy, recovery
from coppice.instance import directory as directories
from coppice.model import GcReport, MachineSpec
from coppice.names import is_id
from coppice.ownership import require_operator
from coppice.store import locks

_WRITTEN_WITHIN_S = 600.0  # no temporary file is written for longer: the tools of e2fsprogs have a deadline of 300 s
_DOCTOR_PREFIX = ".coppice-doctor-"


class Housekeeping(HostBase):
    """Tidying up."""

    async def gc(self, *, dry_run: bool = False, caches: bool = False) -> GcReport:
        """Remove what nothing owns: directories and lock files without a record, VMMs without an instance, leftovers of builds and checks that died.

        With `caches` also what no instance or snapshot uses and can be had again: kernels that were fetched, boot files, empty disks, images without a
        name. With `dry_run` only says what it would remove. What is in use, or may be about to be, is never touched.

        :raises Refused: the host has an owner: what is left behind is nobody's
        :raises Busy: operations are under way that may be about to use a cache
        """
        require_operator(self.owner, "gc")
        await recovery.recover(self.rooms)
        under_way = await in_thread(self.rooms.store.journal)
        if caches and under_way:
            raise Busy(
                "operations are under way, which may need the caches", hint="wait for them, or leave out --caches"
            )
        found: list[tuple[str, int]] = []
        for path in await in_thread(self._leftovers):
            found.append(await self._remove_path(path, dry_run=dry_run))
        for key in sorted(await in_thread(self._unowned)):
            found += await self._collect(key, dry_run=dry_run)
        for directory in await in_thread(self._with_copies):
            found += await self._remove_copies(directory, dry_run=dry_run)
        if not dry_run:
            await in_thread(self.rooms.kernels.sweep)
        if caches:
            for path in await in_thread(self._unused):
                found.append(await self._remove_path(path, dry_run=dry_run))
            found += await in_thread(self._unused_kernels, dry_run=dry_run)
            found += await in_thread(self._unnamed_images, dry_run=dry_run)
        return GcReport(
            removed=tuple(name for name, _ in found), bytes_freed=sum(size for _, size in found), dry_run=dry_run
        )

    async def _remove_path(self, path: Path, *, dry_run: bool) -> tuple[str, int]:
        size = await in_thread(directories.allocated_bytes, path)
        if not dry_run:
            await in_thread(directories.remove, path)
        return self._shown(path), size

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self.rooms.layout.home))

    def _leftovers(self) -> list[Path]:
        """What only a process that died can have left: it has a name that nothing is ever found by."""
        layout, rooms = self.rooms.layout, self.rooms
        holders = (*layout.instances.iterdir(), *layout.snapshots.iterdir(), *layout.volumes.iterdir())
        half_removed = [path for path in holders if not is_id(path.name)]
        caches = (layout.overlays, layout.initramfs, layout.kernels, layout.images)
        half_removed += [path for cache in caches for path in cache.iterdir() if directories.is_half_removed(path)]
        # In a volume's directory: what a check of it was killed over.
        writing = (layout.overlays, layout.initramfs, *layout.volumes.iterdir())
        written = [
            *(path for directory in writing for path in _named(directory, is_temporary)),
            *_named(layout.home, lambda name: name.startswith(_DOCTOR_PREFIX)),
            *_named(rooms.images.root / "names", lambda name: name.endswith(".new")),
        ]
        old = [path for path in written if _modified(path) < time.time() - _WRITTEN_WITHIN_S]
        return sorted([*half_removed, *old, *rooms.images.stale_staging(), *rooms.kernels.stale_staging()])

    def _unused(self) -> list[Path]:
        """Caches by content that no instance has a link to, or was made with."""
        layout, rooms = self.rooms.layout, self.rooms
        disks = {rooms.overlays.path(machine.overlay_bytes).name for machine in self._machines()}
        return sorted(
            [
                *_named(layout.overlays, lambda name: name not in disks and not is_temporary(name)),
                *(path for path in _named(layout.initramfs, lambda name: name.endswith(".cpio")) if _links(path) == 1),
            ]
        )

    def _unused_kernels(self, *, dry_run: bool) -> list[tuple[str, int]]:
        """Kernels that were fetched, and that no instance or snapshot is to be started with."""
        kernels, store = self.rooms.kernels, self.rooms.store
        found: list[tuple[str, int]] = []
        for path in kernels.fetched_except({machine.kernel for machine in self._machines()}):
            size = directories.allocated_bytes(path)
            try:
                if not dry_run:
                    kernels.remove(path.name, partial(store.retire_kernel, path.name))
            except (InUse, NotFound):
                continue  # somebody was faster
            found.append((self._shown(path), size))
        return found

    def _machines(self) -> list[MachineSpec]:
        store = self.rooms.store
        machines = [instance.machine for instance in store.instances()]
        return machines + [snapshot.machine for snapshot in store.snapshots.all()]

    def _unnamed_images(self, *, dry_run: bool) -> list[tuple[str, int]]:
        """Images that nobody can ask for by name, and nothing runs."""
        images, in_use = self.rooms.images, self.rooms.store.users_of_image
        found: list[tuple[str, int]] = []
        for image in images.list():
            if image.name or in_use(image.digest):
                continue
            try:
                path = images.root_file(image).parent
                size = directories.allocated_bytes(path)
                if not dry_run:
                    images.remove(image.digest, in_use)
            except (InUse, NotFound):
                continue  # somebody was faster
            found.append((self._shown(path), size))
        return found

    def _unowned(self) -> set[str]:
        """Ids that have a directory, a lock file or a VMM, but no record."""
        # Records last: an instance that is made meanwhile has its record before its directory.
        layout = self.rooms.layout
        holders = (*layout.instances.iterdir(), *layout.snapshots.iterdir(), *layout.volumes.iterdir())
        present = {path.name for path in holders}
        present |= {path.stem for path in layout.locks.iterdir()}
        present |= {directory.name for directory in self.rooms.driver.find_orphans(layout.instances)}
        known = self.rooms.store.known()
        return {name for name in present if is_id(name)} - known

    async def _collect(self, key: str, *, dry_run: bool) -> list[tuple[str, int]]:
        """Remove what is left of an instance, snapshot or volume without a record, unless somebody holds it; return names and bytes."""
        layout = self.rooms.layout
        lock, directory = layout.lock(key), self.rooms.directory(key)
        locked_before = lock.exists()
        descriptor = locks.try_lock(lock)
        if descriptor is None:
            return []
        try:
            # Again, now that it is held: a spare has become a fork meanwhile, or a snapshot is whole.
            if key in await in_thread(self.rooms.store.known):
                return []
            processes = await in_thread(destroy.working_in, self.rooms, directory)
            found = [(f"process {process.pid}", 0) for process in processes]
            placed = [path for path in (directory, layout.snapshot(key), layout.volume(key)) if path.exists()]
            for path in placed:
                found.append((self._shown(path), await in_thread(directories.allocated_bytes, path)))
            if locked_before:
                found.append((self._shown(lock), 0))
            if not dry_run:
                await destroy.end_all_in(self.rooms, directory)
                for path in placed:
                    await in_thread(directories.remove, path)
            return found
        finally:
            if not (dry_run and locked_before):
                lock.unlink(missing_ok=True)
            locks.release(descriptor)

    def _with_copies(self) -> list[Path]:
        """Instances and snapshots that have beside their disk what a check of it was killed over. It may also be at work."""
        holders = (*self.rooms.layout.instances.iterdir(), *self.rooms.layout.snapshots.iterdir())
        known = self.rooms.store.known()
        return sorted(path for path in holders if path.name in known and any(_named(path, is_temporary)))

    async def _remove_copies(self, directory: Path, *, dry_run: bool) -> list[tuple[str, int]]:
        """Remove what is half-written in a directory that nobody holds, and that no operation is at work on."""
        lock = self.rooms.layout.lock(directory.name)
        descriptor = locks.try_lock(lock)
        if descriptor is None:
            return []
        try:
            if directory.name not in await in_thread(self.rooms.store.known):
                lock.unlink(missing_ok=True)  # removed meanwhile, and taking the lock has made its file again
                return []
            if await in_thread(self.rooms.store.journal_entry, directory.name) is not None:
                return []
            return [await self._remove_path(path, dry_run=dry_run) for path in _named(directory, is_temporary)]
        finally:
            locks.release(descriptor)


def _named(directory: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):  # it has just been removed
        yield from [path for path in directory.iterdir() if wanted(path.name)]


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return time.time()  # it has just been given its name


def _links(path: Path) -> int:
    try:
        return path.lstat().st_nlink
    except FileNotFoundError:
        return 0
