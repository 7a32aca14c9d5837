"""Use cases of snapshots, and the check of everything that was captured."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from coppice.completion import complete, in_thread
from coppice.disk.atomic import os_errors
from coppice.errors import Busy, NoSpace, NotFound
from coppice.fork.fanout import fan_out
from coppice.fork.plan import make_request
from coppice.host.admission import demand_of_activation, demand_of_forks, demand_of_snapshot
from coppice.host.base import Reference
from coppice.host.lifecycle import Lifecycle
from coppice.instance import directory as directories
from coppice.instance import rollback, snapshot, verify
from coppice.lifecycle import Operation
from coppice.model import (
    ForkReport,
    Instance,
    ProgressSink,
    Publish,
    Record,
    Snapshot,
    SnapshotKind,
    State,
    VerifyReport,
    no_progress,
)
from coppice.names import check_name, check_reference, check_tags, new_name
from coppice.ownership import no_snapshot, owns, require_operator
from coppice.store import locks
from coppice.vmm import driver as files

SnapshotReference = str | Snapshot
"""How a caller names a snapshot: by name, by id, or by a record that it was given."""


class SnapshotInspection(Record, frozen=True, kw_only=True):
    """All that is known of one snapshot. Sizes are allocated bytes."""

    snapshot: Snapshot
    source_lives: bool
    forks: tuple[str, ...]  # living instances that were forked from it, or taken back to it
    directory: str
    memory_bytes: int
    disk_bytes: int
    link_count: int  # holders of its mem-file; 0 where it has none


class Snapshots(Lifecycle):
    """Named moments of instances."""

    async def snapshot_create(
        self,
        reference: Reference,
        *,
        name: str | None = None,
        kind: SnapshotKind | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Snapshot:
        """Keep an instance as it is now under a name of its own. The snapshot never changes, and outlives the instance.

        A Standby snapshot has memory and disk, a Stopped one the disk alone; the default is Standby, unless the instance is Stopped. One that is
        Running is paused for some milliseconds (`pause_ms`), and runs on. Nothing is left behind if it fails.

        :raises NameTaken: another snapshot has the name
        :raises IllegalTransition: the instance has no memory for a Standby snapshot, or is just changing
        """
        chosen = check_name(name) if name is not None else None
        valid_tags = check_tags(tags or {})
        running = (await self._current(reference)).state is State.RUNNING
        async with self._hold(reference, Operation.SNAPSHOT, shared=not running) as (source, _):
            if source.state is State.RUNNING and not running:
                raise Busy(f"{source.name} was started at the same time", hint="try again")
            await self._admit(await in_thread(demand_of_snapshot, self.rooms, source))
            made = snapshot.new_snapshot(source, chosen or new_name(source.name), kind, valid_tags)
            async with locks.hold(self.rooms.layout.lock(made.id), what=made.name):
                try:
                    await in_thread(self.rooms.store.snapshots.create, made, snapshot.OPERATION)
                    whole = await snapshot.create(self.rooms, source, made)
                except BaseException:
                    await complete(snapshot.remove(self.rooms, made.id))
                    raise
        self._hash().captured(whole)
        return whole

    async def snapshot_ls(
        self, *, source: Reference | None = None, tags: Mapping[str, str] | None = None
    ) -> list[Snapshot]:
        """The owner's snapshots, oldest first, or those of `source` (name or id, also of an instance that is gone) that have all of `tags`."""
        wanted = source.id if isinstance(source, Instance) else source
        return [
            each
            for each in await in_thread(self.rooms.store.snapshots.all)
            if owns(self.owner, each)
            and (wanted is None or wanted in (each.source, each.source_name))
            and (tags or {}).items() <= each.tags.items()
        ]

    async def snapshot_inspect(self, reference: SnapshotReference) -> SnapshotInspection:
        """One snapshot with its sizes, its links and its forks.

        :raises NotFound: there is none
        """
        found = await self._snapshot(reference)
        return await in_thread(self._inspect_snapshot, found)

    def _inspect_snapshot(self, found: Snapshot) -> SnapshotInspection:
        directory = self.rooms.layout.snapshot(found.id)
        present = {name: (directory / name).stat() for name in directories.CAPTURED if (directory / name).exists()}
        memory, disk = present.get(files.MEMORY), present.get(files.OVERLAY_DISK)
        instances = self.rooms.store.instances()
        return SnapshotInspection(
            snapshot=found,
            source_lives=any(instance.id == found.source for instance in instances),
            forks=tuple(instance.name for instance in instances if instance.snapshot == found.id),
            directory=str(directory),
            memory_bytes=memory.st_blocks * 512 if memory else 0,
            disk_bytes=disk.st_blocks * 512 if disk else 0,
            link_count=memory.st_nlink if memory else 0,
        )

    async def snapshot_restore(self, reference: SnapshotReference, *, start: bool = False) -> Instance:
        """Take the instance that a snapshot was made of back to that moment: its memory and disk of now are lost; if it runs, it is ended.

        It is then Standby (Stopped, where the snapshot has no memory), or, with `start`, Running. To keep both, fork the snapshot.

        :raises NotFound: there is no such snapshot, or its instance is gone
        :raises IllegalTransition: the instance is a template
        :raises IntegrityError: the snapshot's memory is not what was captured
        """
        async with self._hold_snapshot(reference) as moment:
            try:
                await self._get(moment.source)
            except NotFound as error:
                raise NotFound(
                    f"{moment.source_name}, of which the snapshot {moment.name!r} was made, is gone",
                    hint=f"fork it instead: `coppice snapshot fork {moment.name}`",
                ) from error
            async with self._hold(moment.source, Operation.SNAPSHOT_RESTORE) as (instance, _):
                if start and instance.vmm is None:
                    await self._admit(demand_of_activation(instance, boot=moment.mem_file is None))
                restored = await rollback.roll_back(self.rooms, instance, moment)
                self._hash().captured(restored)
                if not start:
                    return restored
                operation = "start" if restored.state is State.STOPPED else "restore"
                return await self._activate(restored, operation, boot=restored.state is State.STOPPED)

    async def snapshot_fork(
        self,
        reference: SnapshotReference,
        *,
        count: int = 1,
        names: Sequence[str] = (),
        target: State = State.RUNNING,
        atomic: bool = False,
        tags: Mapping[str, str] | None = None,
        publish: Sequence[Publish] = (),
        payload: bytes | None = None,
        payloads: Sequence[bytes] = (),
        progress: ProgressSink = no_progress,
    ) -> ForkReport:
        """Grow forks from a snapshot, as `fork` does from an instance. Their parent is the snapshot's instance, if that still lives.

        :raises NotFound: there is no such snapshot
        :raises IllegalTransition: a Stopped snapshot has no memory to fork to Standby
        :raises NoSpace: so many do not fit into a budget; none was made
        :raises UsageError: count, names, target or payloads can never be
        """
        request = make_request(
            count=count,
            names=names,
            target=target,
            atomic=atomic,
            tags=tags or {},
            publish=publish,
            from_running=False,
            payload=payload,
            payloads=payloads,
        )
        async with self._hold_snapshot(reference) as found:
            parent = None
            with contextlib.suppress(NotFound):
                parent = await self._get(found.source)
            source, origin = snapshot.as_source(found), self.rooms.layout.snapshot(found.id)
            admit = await self._admit(await in_thread(demand_of_forks, self.rooms, source, request, origin))
            forked = await fan_out(
                self.rooms,
                source,
                request,
                progress,
                owner=self.owner,
                admit=admit,
                parent=parent,
                snapshot=found,
            )
        self._hash().captured(*forked.instances)
        return forked

    async def snapshot_rm(self, reference: SnapshotReference) -> None:
        """Remove a snapshot. Its instance does not notice, nor do its forks, which own what they share with it.

        :raises NotFound: there is none
        """
        async with self._hold_snapshot(reference, shared=False) as found:
            await complete(self._remove_snapshot(found))

    async def _remove_snapshot(self, found: Snapshot) -> None:
        with contextlib.suppress(NoSpace):  # a full disk must not keep anybody from making room
            await in_thread(self.rooms.store.snapshots.begin, found, snapshot.REMOVAL)
        await snapshot.remove(self.rooms, found.id)

    async def verify(self, *, progress: ProgressSink = no_progress) -> VerifyReport:
        """Check that every captured mem-file and every disk at rest is what it was, volumes included, and name what differs.

        Compares inode, size, mode and SHA-256, and runs e2fsck over disks that no machine uses. A SHA-256 that was not computed in the background
        yet is recorded for the next time. Nothing is changed or repaired.

        :raises MissingTool: e2fsck is not installed
        :raises Refused: the host has an owner: everybody's files are looked at
        """
        require_operator(self.owner, "verify")
        return await verify.verify(self.rooms, progress)

    async def _snapshot(self, reference: SnapshotReference) -> Snapshot:
        key = reference.id if isinstance(reference, Snapshot) else check_reference(reference)
        found = await in_thread(self.rooms.store.snapshots.get, key)
        if not owns(self.owner, found):
            raise no_snapshot(key)
        return found

    @contextlib.asynccontextmanager
    async def _hold_snapshot(self, reference: SnapshotReference, *, shared: bool = True) -> AsyncIterator[Snapshot]:
        """Hold a snapshot, so that nobody removes it; exclusively, so that nobody uses it either."""
        found = await self._snapshot(reference)
        lock = self.rooms.layout.lock(found.id)
        with os_errors(f"use the snapshot {found.name}"):
            async with locks.hold(lock, shared=shared, deadline_s=self.rooms.deadlines.lock, what=found.name):
                try:
                    found = await self._snapshot(found)
                except NotFound:
                    lock.unlink(missing_ok=True)  # removed meanwhile, and taking the lock has made its file again
                    raise
                yield found
