"""Use cases that only look: ls, inspect, tree, stats; and the housekeeping that follows from looking: gc."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from coppice.errors import CoppiceError
from coppice.host.base import HostBase, Reference
from coppice.instance import activate, recovery
from coppice.instance import directory as directories
from coppice.model import GcReport, Instance, MemoryReport, Record, State, TreeNode
from coppice.names import is_id
from coppice.store import locks


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
        """All instances, oldest first, or those in `state` that have all of `tags`."""
        recorded = await asyncio.to_thread(self.rooms.store.instances)
        found: list[Instance] = []
        for instance in recorded:
            current = await recovery.look(self.rooms, instance)
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
        """
        await recovery.recover(self.rooms)
        removed: list[str] = []
        freed = 0
        for path in await asyncio.to_thread(self._unowned):
            lock = self.rooms.layout.lock(path.name) if is_id(path.name) else None
            descriptor = locks.try_lock(lock) if lock else None
            if lock and descriptor is None:
                continue
            try:
                freed += await asyncio.to_thread(directories.allocated_bytes, path)
                removed.append(str(path.relative_to(self.rooms.layout.home)))
                if not dry_run:
                    await self._remove_unowned(path)
            finally:
                if descriptor is not None:
                    locks.release(descriptor)
                    if lock and not dry_run:
                        lock.unlink(missing_ok=True)
        return GcReport(removed=tuple(removed), bytes_freed=freed, dry_run=dry_run)

    def _unowned(self) -> list[Path]:
        # Directories first, records second: an instance that is made meanwhile has its record before its directory.
        layout = self.rooms.layout
        present = sorted([*layout.instances.iterdir(), *(lock.with_suffix("") for lock in layout.locks.iterdir())])
        owned = {instance.id for instance in self.rooms.store.instances()}
        stale = self.rooms.images.stale_staging()
        return [path for path in present if path.name not in owned] + stale

    async def _remove_unowned(self, path: Path) -> None:
        orphans = await asyncio.to_thread(self.rooms.driver.find_orphans, self.rooms.layout.instances)
        for process in orphans.get(path.resolve(), []):
            await self.rooms.driver.quit(path, process)
        await asyncio.to_thread(directories.remove, path)
