"""Use cases that only read: get, ls, inspect, tree, stats."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import msgspec

from coppice import stopping
from coppice.completion import in_thread
from coppice.errors import CoppiceError, NotFound
from coppice.host import process, recovery
from coppice.host.base import UseCases
from coppice.machine.rooms import Rooms
from coppice.model import Instance, MemoryReport, Snapshot, State, TreeNode
from coppice.model.inspection import Inspection
from coppice.model.ownership import owns
from coppice.requests import GetRequest, InspectRequest, LsRequest, StatsRequest, TreeRequest, UnloadableRequest

_log = logging.getLogger(__name__)


class View(UseCases):
    """The operations that only read."""

    async def get(self, request: GetRequest) -> Instance:
        """Look up the instance, and check its VMM."""
        return await self._with_observed(await self._seen(request.instance))

    async def _seen(self, key: str) -> Instance:
        """Return the instance in its true state, with the end of its process."""
        instance = await self._current(key)
        if process.may_end(instance) and await in_thread(process.has_news, self.rooms.directory(instance.id)):
            return await process.learn(self.rooms, instance)
        return instance

    async def _with_observed(self, instance: Instance) -> Instance:
        if instance.supervision is None:
            return instance
        seen = await in_thread(self.rooms.store.supervised.observed_of, instance.id)
        return msgspec.structs.replace(instance, observed=seen)

    async def ls(self, request: LsRequest) -> list[Instance]:
        """List the instances of this host's owner, and check their VMMs."""
        await recovery.recover(self.rooms)
        recorded = await in_thread(self.rooms.store.instances)
        recorded = [instance for instance in recorded if owns(self.owner, instance)]
        found: list[Instance] = []
        for instance in recorded:
            try:
                current = await recovery.look(self.rooms, instance) if instance.vmm is not None else instance
            except NotFound:
                continue  # removed since the list was read
            except CoppiceError as error:
                _log.warning("cannot find out the state of %s: %s", instance.name, error)
                current = msgspec.structs.replace(instance, state=State.UNKNOWN)
            wanted = request.tags.items() <= current.tags.items()
            if wanted and request.state in (None, current.state):
                found.append(current)
        found = await process.look(self.rooms, found)
        seen = await in_thread(self.rooms.store.supervised.observed)
        return [
            msgspec.structs.replace(each, observed=seen.get(each.id)) if each.supervision else each for each in found
        ]

    async def unloadable(self, request: UnloadableRequest) -> dict[str, str]:
        """Compare the manifest of each capture with this host."""
        instances, snapshots = await in_thread(self._captures)
        holders: list[Instance | Snapshot] = [*instances, *snapshots]
        wanted = {each.id for each in holders} if request.holders is None else set(request.holders)
        holders = [each for each in holders if owns(self.owner, each) and each.id in wanted]
        from coppice.machine import loadable

        return await loadable.unloadable(self.rooms.drivers, holders)

    def _captures(self) -> tuple[list[Instance], list[Snapshot]]:
        return self.rooms.store.instances(), self.rooms.store.snapshots.all()

    async def inspect(self, request: InspectRequest) -> Inspection:
        """Look up the instance, its forks, its disk and its memory."""
        from coppice.machine import disk, disks

        instance = await self._seen(request.instance)
        forks = await in_thread(self.rooms.store.children, instance.id)
        directory = self.rooms.directory(instance.id)
        own = disks.paths(directory, disks.own(instance))
        return Inspection(
            instance=await self._with_observed(instance),
            fork_count=len(forks),
            forks=tuple(fork.name for fork in forks if owns(self.owner, fork)),
            directory=str(directory),
            disk_bytes=await in_thread(disk.allocated, own),
            memory=await self._memory(instance),
        )

    async def stats(self, request: StatsRequest) -> dict[str, MemoryReport]:
        """Read the memory accounts and the traffic of one instance, or of all. Of many, no guest is asked."""
        from coppice.host.traffic import traffic_of  # imports the agent's client, which no other view needs

        alone = request.instance is not None
        instances = [await self._current(request.instance)] if request.instance else await self.ls(LsRequest())
        reports = await self._memories(instances)
        running = [each for each in instances if each.id in reports and each.state is State.RUNNING]
        counted = await asyncio.gather(*(traffic_of(self.rooms, each, ask=alone) for each in running))
        for each, traffic in zip(running, counted, strict=True):
            reports[each.id] = msgspec.structs.replace(reports[each.id], traffic=traffic)
        return {instance.name: reports[instance.id] for instance in instances if instance.id in reports}

    async def tree(self, request: TreeRequest) -> list[TreeNode]:
        """Order the instances as a tree: each is followed by its forks."""
        instances = await self.ls(LsRequest())
        known = {instance.id for instance in instances}
        forks: dict[str | None, list[Instance]] = {}
        for instance in instances:
            forks.setdefault(instance.parent if instance.parent in known else None, []).append(instance)
        roots = [await self._current(request.instance)] if request.instance else forks.get(None, [])
        pending = [(root, 0) for root in reversed(roots)]
        found: list[tuple[Instance, int]] = []
        while pending:
            found.append(pending.pop())
            instance, depth = found[-1]
            pending += [(fork, depth + 1) for fork in reversed(forks.get(instance.id, []))]
        reports = await self._memories([instance for instance, _ in found])
        return [
            TreeNode(
                instance=instance,
                depth=depth,
                fork_count=len(forks.get(instance.id, [])),
                memory=reports.get(instance.id),
            )
            for instance, depth in found
        ]

    async def _memory(self, instance: Instance) -> MemoryReport | None:
        return (await self._memories([instance])).get(instance.id)

    async def _memories(self, instances: Sequence[Instance]) -> dict[str, MemoryReport]:
        """Report the memory of those instances that have any, by id: all in one call of a thread."""
        return await in_thread(measured, self.rooms, instances)


def measured(rooms: Rooms, instances: Sequence[Instance]) -> dict[str, MemoryReport]:
    """Report the memory of those instances that have any, by id. Blocks."""
    from coppice.machine import activate, limits

    reports: dict[str, MemoryReport] = {}
    for instance in instances:
        stopping.check()
        if instance.mem_file is None and instance.vmm is None:
            continue
        with contextlib.suppress(CoppiceError):  # the VMM ended after the state was read
            report = activate.memory_of(rooms, instance)
            if instance.vmm is not None:
                used = limits.usage(rooms.directory(instance.id))
                report = msgspec.structs.replace(report, usage=used)
            reports[instance.id] = report
    return reports
