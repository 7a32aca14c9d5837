"""Housekeeping: gc removes leftovers of killed processes, and on request caches.

A leftover has a temporary name that nothing looks up, or an id without a record. Everything else is
in use.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from coppice.completion import in_thread
from coppice.content.store import ContentStore, Removed
from coppice.errors import Busy, InUse, NotFound
from coppice.host import recovery
from coppice.host.base import UseCases
from coppice.images import cache
from coppice.linux.files import allocated_bytes, is_temporary
from coppice.machine import destroy, disks
from coppice.machine import directory as directories
from coppice.model import GcReport, Instance, Snapshot
from coppice.model.ownership import require_operator
from coppice.names import is_id
from coppice.requests import GcRequest
from coppice.state import locks
from coppice.state.layout import PROBE_PREFIX

_WRITTEN_WITHIN_S = 600.0  # older temporary files are leftovers: e2fsprogs tools have 300 s to finish


class Housekeeping(UseCases):
    """The removal of leftovers and caches."""

    async def gc(self, request: GcRequest) -> GcReport:
        """Find leftovers, and remove them unless this is a dry run."""
        dry_run, caches = request.dry_run, request.caches
        require_operator(self.owner, "gc")
        await recovery.recover(self.rooms)
        under_way = await in_thread(self.rooms.store.journal)
        if caches and under_way:
            raise Busy(
                "cannot remove caches: operations are under way that may need them",
                hint="wait for them, or omit --caches",
            )
        found: list[tuple[str, int]] = []
        for path in await in_thread(self._leftovers):
            found.append(await self._remove_path(path, dry_run=dry_run))
        for key in sorted(await in_thread(self._unowned)):
            found += await self._collect(key, dry_run=dry_run)
        for directory in await in_thread(self._with_copies):
            found += await self._remove_copies(directory, dry_run=dry_run)
        removed = await in_thread(self._sweep, unnamed=caches, dry_run=dry_run)
        if caches:
            removed += await in_thread(self._sweep_caches, dry_run=dry_run)
        found += [(self._shown(each.path), each.size_bytes) for each in removed]
        return GcReport(
            removed=tuple(name for name, _ in found), bytes_freed=sum(size for _, size in found), dry_run=dry_run
        )

    async def _remove_path(self, path: Path, *, dry_run: bool) -> tuple[str, int]:
        size = await in_thread(allocated_bytes, path)
        if not dry_run:
            await in_thread(directories.remove, path)
        return self._shown(path), size

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self.rooms.layout.home))

    def _leftovers(self) -> list[Path]:
        """Return the paths with temporary names, which only a dead process can have left."""
        layout = self.rooms.layout
        holders = (*layout.instances.iterdir(), *layout.snapshots.iterdir(), *layout.volumes.iterdir())
        half_removed = [path for path in holders if not is_id(path.name)]
        # A killed check of a volume leaves a copy in the volume's directory.
        written = [
            *(path for directory in layout.volumes.iterdir() for path in _named(directory, is_temporary)),
            *_named(layout.home, lambda name: name.startswith(PROBE_PREFIX)),
        ]
        old = [path for path in written if _modified(path) < time.time() - _WRITTEN_WITHIN_S]
        return sorted([*half_removed, *old])

    def _sweep(self, *, unnamed: bool, dry_run: bool) -> list[Removed]:
        """Remove leftovers from the content stores. `unnamed`: also images without a name."""
        rooms = self.rooms
        others = (ContentStore(rooms.layout.initramfs), ContentStore(rooms.layout.uploads))
        stores = (rooms.kernels.content, rooms.overlays.content, *others)
        found = [removed for store in stores for removed in store.sweep(dry_run=dry_run)]
        return found + rooms.images.sweep(unnamed=unnamed, dry_run=dry_run)

    def _sweep_caches(self, *, dry_run: bool) -> list[Removed]:
        """Remove unused, reproducible content: fetched kernels, pulled layers, boot files, empty
        disks.
        """
        rooms, records = self.rooms, self.rooms.store
        holders: list[Instance | Snapshot] = [*records.instances(), *records.snapshots.all()]
        machines = [each.machine for each in holders]
        sizes = {each.size_bytes for holder in holders for each in disks.of(holder)}
        formats = {driver.capabilities.layer_format for driver in rooms.drivers}
        empty = {
            *(rooms.overlays.path(machine.overlay_bytes).name for machine in machines),
            *(rooms.overlays.layer_path(size, each).name for size in sizes for each in formats),
        }
        initramfs = ContentStore(rooms.layout.initramfs)
        overlays = rooms.overlays.content
        removals: list[Callable[..., Removed]] = [
            *(
                partial(overlays.remove, path.name, records.retire_unused)
                for path in overlays.entries()
                if path.name not in empty
            ),
            *(
                partial(initramfs.remove, path.name, records.retire_unused)
                for path in initramfs.entries()
                if _links(path) == 1
            ),
            *(
                partial(rooms.kernels.remove, key, partial(records.retire_kernel, key))
                for key in rooms.kernels.fetched_except({machine.kernel for machine in machines})
            ),
        ]
        found = []
        for remove in removals:
            with contextlib.suppress(Busy, InUse, NotFound):  # removed or taken into use meanwhile
                found.append(remove(dry_run=dry_run))
        return found + cache.sweep(rooms.layout.blobs, dry_run=dry_run)

    def _unowned(self) -> set[str]:
        """Return the ids without a record that have a directory, lock file, VMM or network."""
        # Read the records last: a new instance is recorded before its directory is made.
        layout = self.rooms.layout
        holders = (*layout.instances.iterdir(), *layout.snapshots.iterdir(), *layout.volumes.iterdir())
        present = {path.name for path in holders}
        present |= {path.stem for path in layout.locks.iterdir()}
        for driver in self.rooms.drivers:
            present |= {directory.name for directory in driver.find_orphans(layout.instances)}
        known = self.rooms.store.known
        return ({name for name in present if is_id(name)} - known()) | self.rooms.networks.leftovers(known)

    async def _collect(self, key: str, *, dry_run: bool) -> list[tuple[str, int]]:
        """Remove the leftovers of an instance, snapshot or volume that has no record.

        Do nothing if its lock is held. Return the names and sizes of what was found.
        """
        layout = self.rooms.layout
        lock, directory = layout.lock(key), self.rooms.directory(key)
        locked_before = lock.exists()
        descriptor = locks.try_lock(lock)
        if descriptor is None:
            return []
        try:
            # Check again under the lock: meanwhile a spare may have become a fork with a record.
            if key in await in_thread(self.rooms.store.known):
                return []
            processes = await in_thread(destroy.working_in, self.rooms, directory)
            found = [(f"process {process.pid}", 0) for process in processes]
            placed = [path for path in (directory, layout.snapshot(key), layout.volume(key)) if path.exists()]
            for path in placed:
                found.append((self._shown(path), await in_thread(allocated_bytes, path)))
            if locked_before:
                found.append((self._shown(lock), 0))
            if key in await in_thread(self.rooms.networks.leftovers, self.rooms.store.known):
                found.append((f"network of {key}", 0))
            if not dry_run:
                await destroy.end_all_in(self.rooms, key)
                for path in placed:
                    await in_thread(directories.remove, path)
                await in_thread(self.rooms.store.release_user, key)
            return found
        finally:
            if not (dry_run and locked_before):
                locks.remove(lock)
            locks.release(descriptor)

    def _with_copies(self) -> list[Path]:
        """Return the directories of instances and snapshots that contain a copy of their disk.

        The check that made the copy was killed, or is still running.
        """
        holders = (*self.rooms.layout.instances.iterdir(), *self.rooms.layout.snapshots.iterdir())
        known = self.rooms.store.known()
        return sorted(path for path in holders if path.name in known and any(_named(path, is_temporary)))

    async def _remove_copies(self, directory: Path, *, dry_run: bool) -> list[tuple[str, int]]:
        """Remove half-written files from a directory, unless it is locked or in the journal."""
        lock = self.rooms.layout.lock(directory.name)
        descriptor = locks.try_lock(lock)
        if descriptor is None:
            return []
        try:
            if directory.name not in await in_thread(self.rooms.store.known):
                locks.remove(lock)
                return []
            if await in_thread(self.rooms.store.journal_entry, directory.name) is not None:
                return []
            return [await self._remove_path(path, dry_run=dry_run) for path in _named(directory, is_temporary)]
        finally:
            locks.release(descriptor)


def _named(directory: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        yield from [path for path in directory.iterdir() if wanted(path.name)]


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return time.time()  # renamed to its final name meanwhile


def _links(path: Path) -> int:
    try:
        return path.lstat().st_nlink
    except FileNotFoundError:
        return 0
