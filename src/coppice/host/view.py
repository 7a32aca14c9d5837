"""Use cases that only look: ls, inspect, tree, stats; and the housekeeping that follows from looking: gc."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from coppice.completion import in_thread
from coppice.disk.atomic import is_temporary
from coppice.errors import CoppiceError, NotFound
from coppice.host.base import HostBase, Reference
from coppice.instance import activate, recovery
from coppice.instance import directory as directories
from coppice.model import GcReport, Instance, MemoryReport, Record, State, TreeNode
from coppice.names import is_id
from coppice.ownership import owns, require_operator
from coppice.store import locks

_log = logging.getLogger(__name__)
_WRITTEN_WITHIN_S = 600.0  # no temporary file is written for longer: mke2fs has a deadline of 120 s


class Inspection(Record, frozen=True, kw_only=True):
    """All that is known of one instance."""

    instance: Instance
    fork_count: int
    forks: tuple[str, ...]
    directory: str
    disk_bytes: int  # allocated by its own overlay disk
    memory: MemoryReport | None


class View(HostBase):
    """Reading."""

    async def get(self, reference: Reference) -> Instance:
        """The instance as it truly is: a VMM that ended since it was recorded is noticed here.

        :raises NotFound: there is none
        """
        return await recovery.look(self.rooms, await self._get(reference))

    async def ls(self, *, state: State | None = None, tags: Mapping[str, str] | None = None) -> list[Instance]:
        """The owner's instances, oldest first, or those in `state` that have all of `tags`. The operator sees all."""
        recorded = await asyncio.to_thread(self.rooms.store.instances)
        recorded = [instance for instance in recorded if owns(self.owner, instance)]
        found: list[Instance] = []
        for instance in recorded:
            try:
                current = await recovery.look(self.rooms, instance)
            except NotFound:
                continue  # removed since the list was read
            except CoppiceError as error:
                _log.warning("%s cannot be brought to rest yet: %s", instance.name, error)
                current = instance
            wanted = (tags or {}).items() <= current.tags.items()
            if wanted and (state is None or current.state is state):
                found.append(current)
        return found

    async def inspect(self, reference: Reference) -> Inspection:
        """One instance with its forks, its disk and its memory as the kernel accounts it."""
        instance = await self.get(reference)
        forks = await asyncio.to_thread(self.rooms.store.children, instance.id)
        directory = self.rooms.directory(instance.id)
        return Inspection(
            instance=instance,
            fork_count=len(forks),
            forks=tuple(fork.name for fork in forks),
            directory=str(directory),
            disk_bytes=await asyncio.to_thread(directories.overlay_bytes, directory),
            memory=await self._memory(instance),
        )

    async def stats(self, reference: Reference | None = None) -> dict[str, MemoryReport]:
        """Memory by instance name, of one or of all that have any."""
        instances = [await self.get(reference)] if reference is not None else await self.ls()
        reports = {instance.name: await self._memory(instance) for instance in instances}
        return {name: report for name, report in reports.items() if report is not None}

    async def tree(self, reference: Reference | None = None) -> list[TreeNode]:
        """The lineage: each instance with its forks below it, from one root or from all.

        An instance whose parent is gone is a root.
        """
        instances = await self.ls()
        known = {instance.id for instance in instances}
        children: dict[str | None, list[Instance]] = {}
        for instance in instances:
            children.setdefault(instance.parent if instance.parent in known else None, []).append(instance)
        memory = {instance.id: await self._memory(instance) for instance in instances}

        def node(instance: Instance) -> TreeNode:
            forks = children.get(instance.id, [])
            return TreeNode(
                instance=instance,
                fork_count=len(forks),
                memory=memory[instance.id],
                children=tuple(node(fork) for fork in forks),
            )

        roots = children.get(None, []) if reference is None else [await self.get(reference)]
        return [node(root) for root in roots]

    async def _memory(self, instance: Instance) -> MemoryReport | None:
        try:
            if instance.mem_file is None and instance.vmm is None:
                return None
            return await activate.verify_sharing(self.rooms, instance)
        except CoppiceError:
            return None  # it ended between the look and the reading

    async def gc(self, *, dry_run: bool = False) -> GcReport:
        """Remove what nothing owns: directories and lock files without a record, VMMs without an instance, leftovers of builds that died.

        With `dry_run` only says what it would remove. What is in use, or may be about to be, is never touched.

        :raises Refused: the host has an owner: what is left behind is nobody's
        """
        require_operator(self.owner, "gc")
        await recovery.recover(self.rooms)
        found: list[tuple[str, int]] = []
        for path in await in_thread(self._leftovers):
            found.append((self._shown(path), await in_thread(directories.allocated_bytes, path)))
            if not dry_run:
                await in_thread(directories.remove, path)
        for key in sorted(await in_thread(self._unowned)):
            found += await self._collect(key, dry_run=dry_run)
        return GcReport(
            removed=tuple(name for name, _ in found), bytes_freed=sum(size for _, size in found), dry_run=dry_run
        )

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self.rooms.layout.home))

    def _leftovers(self) -> list[Path]:
        """What only a process that died can have left: it has a name that nothing is ever found by."""
        layout = self.rooms.layout
        half_removed = [path for path in layout.instances.iterdir() if not is_id(path.name)]
        written = [
            path for path in (*layout.overlays.iterdir(), *layout.initramfs.iterdir()) if is_temporary(path.name)
        ]
        old = [path for path in written if path.stat().st_mtime < time.time() - _WRITTEN_WITHIN_S]
        return sorted([*half_removed, *old, *self.rooms.images.stale_staging()])

    def _unowned(self) -> set[str]:
        """Ids that have a directory, a lock file or a VMM, but no record."""
        # Records last: an instance that is made meanwhile has its record before its directory.
        layout = self.rooms.layout
        present = {path.name for path in layout.instances.iterdir()} | {path.stem for path in layout.locks.iterdir()}
        present |= {directory.name for directory in self.rooms.driver.find_orphans(layout.instances)}
        return {name for name in present if is_id(name)} - {instance.id for instance in self.rooms.store.instances()}

    async def _collect(self, key: str, *, dry_run: bool) -> list[tuple[str, int]]:
        """Remove what is left of an instance without a record, unless somebody holds it; return names and bytes."""
        lock, directory = self.rooms.layout.lock(key), self.rooms.directory(key)
        locked_before = lock.exists()
        descriptor = locks.try_lock(lock)
        if descriptor is None:
            return []
        try:
            orphans = await in_thread(self.rooms.driver.find_orphans, self.rooms.layout.instances)
            processes = orphans.get(directory.resolve(), [])
            found = [(f"process {process.pid}", 0) for process in processes]
            if directory.exists():
                found.append((self._shown(directory), await in_thread(directories.allocated_bytes, directory)))
            if locked_before:
                found.append((self._shown(lock), 0))
            if not dry_run:
                for process in processes:
                    await self.rooms.driver.quit(directory, process)
                await in_thread(directories.remove, directory)
            return found
        finally:
            if not (dry_run and locked_before):
                lock.unlink(missing_ok=True)
            locks.release(descriptor)
