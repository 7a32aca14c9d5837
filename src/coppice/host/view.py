"""Use cases that only look: ls, inspect, tree, stats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from coppice.errors import CoppiceError, NotFound
from coppice.host.base import HostBase, Reference
from coppice.instance import activate, recovery
from coppice.instance import directory as directories
from coppice.model import Instance, MemoryReport, Record, State, TreeNode
from coppice.ownership import owns

_log = logging.getLogger(__name__)


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
        return await self._current(reference)

    async def ls(self, *, state: State | None = None, tags: Mapping[str, str] | None = None) -> list[Instance]:
        """The owner's instances, oldest first, or those in `state` that have all of `tags`. The operator sees all."""
        await recovery.recover(self.rooms)
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
