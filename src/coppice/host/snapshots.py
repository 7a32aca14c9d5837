"""Use cases of snapshots, and `verify`, which checks all captures and disks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import Busy, NoSpace, NotFound
from coppice.fork.fanout import fan_out
from coppice.host.admission import demand_of_activation, demand_of_forks, demand_of_snapshot
from coppice.host.lifecycle import Lifecycle
from coppice.linux.files import untranslated
from coppice.machine import directory as directories
from coppice.machine import disk, disks
from coppice.model import ForkReport, Instance, ProgressSink, Snapshot, State, VerifyReport
from coppice.model.inspection import SnapshotInspection
from coppice.model.lifecycle import Operation
from coppice.model.ownership import no_snapshot, owns, require_operator
from coppice.names import new_name
from coppice.requests import (
    SnapshotForkRequest,
    SnapshotInspectRequest,
    SnapshotLsRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    SnapshotRmRequest,
    VerifyRequest,
)
from coppice.snapshots import rollback, snapshot
from coppice.state import locks
from coppice.state.journal import JournalOperation
from coppice.vmm import driver as files


class Snapshots(Lifecycle):
    """The operations on snapshots."""

    async def snapshot(self, request: SnapshotRequest) -> Snapshot:
        """Capture a running instance into a new directory, or link an existing capture there."""
        return await self._save(request)

    async def _save(self, request: SnapshotRequest, *, scheduled: bool = False) -> Snapshot:
        running = (await self._current(request.instance)).state is State.RUNNING
        hold = self._hold if running else self._hold_source
        async with hold(request.instance, Operation.SNAPSHOT) as (source, _):
            if source.state is State.RUNNING and not running:
                raise Busy(f"{source.name} was started at the same time", hint="try again")
            await self._admit(partial(demand_of_snapshot, self.rooms, source))
            name = request.name or new_name(source.name)
            made = snapshot.new_snapshot(source, name, request.kind, dict(request.tags))
            made = msgspec.structs.replace(made, scheduled=scheduled)
            async with locks.hold(self.rooms.layout.lock(made.id), what=made.name):
                try:
                    await in_thread(self.rooms.store.snapshots.create, made, JournalOperation.SNAPSHOT)
                    whole = await snapshot.create(self.rooms, source, made)
                except BaseException:
                    await complete(snapshot.remove(self.rooms, made.id))
                    raise
        self._hash().captured(whole)
        return whole

    async def snapshot_ls(self, request: SnapshotLsRequest) -> list[Snapshot]:
        """List the snapshots of this host's owner."""
        return [
            each
            for each in await in_thread(self.rooms.store.snapshots.all)
            if owns(self.owner, each)
            and request.source in (None, each.source, each.source_name)
            and request.tags.items() <= each.tags.items()
        ]

    async def snapshot_inspect(self, request: SnapshotInspectRequest) -> SnapshotInspection:
        """Read the snapshot's record and the sizes of its files."""
        return await in_thread(self._inspect_snapshot, await self._snapshot(request.snapshot))

    def _inspect_snapshot(self, found: Snapshot) -> SnapshotInspection:
        directory = self.rooms.layout.snapshot(found.id)
        present = {name: (directory / name).stat() for name in directories.CAPTURED if (directory / name).exists()}
        memory = present.get(files.MEMORY)
        in_memory = [status for name, status in present.items() if name in (files.MEMORY, *directories.LAYERS)]
        instances = self.rooms.store.instances()
        return SnapshotInspection(
            snapshot=found,
            source_lives=any(instance.id == found.source for instance in instances),
            forks=tuple(instance.name for instance in instances if instance.snapshot == found.id),
            directory=str(directory),
            memory_bytes=sum(status.st_blocks for status in in_memory) * 512,
            disk_bytes=disk.allocated(disks.paths(directory, disks.of(found))),
            link_count=memory.st_nlink if memory else 0,
        )

    async def snapshot_restore(self, request: SnapshotRestoreRequest) -> Instance:
        """Replace the instance's files by the snapshot's, and start it if requested."""
        async with self._hold_snapshot(request.snapshot) as moment:
            try:
                await self._get(moment.source)
            except NotFound as error:
                raise NotFound(
                    f"cannot restore the snapshot {moment.name!r}: its instance {moment.source_name} is gone",
                    hint=f"`coppice snapshot fork {moment.name}` makes a new instance of it",
                ) from error
            async with self._hold(moment.source, Operation.SNAPSHOT_RESTORE) as (instance, _):
                if request.start and instance.vmm is None:
                    await self._admit(partial(demand_of_activation, self.rooms, instance, boot=moment.mem_file is None))
                restored = await rollback.roll_back(self.rooms, instance, moment)
                self._hash().captured(restored)
                if not request.start:
                    return restored
                operation = JournalOperation.START if restored.state is State.STOPPED else JournalOperation.RESTORE
                return await self._activate(restored, operation, boot=restored.state is State.STOPPED)

    async def snapshot_fork(self, request: SnapshotForkRequest, progress: ProgressSink) -> ForkReport:
        """Grow the forks from the snapshot's files."""
        async with self._hold_snapshot(request.snapshot) as found:
            parent = None
            with contextlib.suppress(NotFound):
                parent = await self._get(found.source)
            source, origin = snapshot.as_source(found), self.rooms.layout.snapshot(found.id)
            record = partial(self._record_forks, partial(demand_of_forks, self.rooms, source, request, origin))
            forked = await fan_out(
                self.rooms,
                source,
                request,
                progress,
                owner=self.owner,
                record=record,
                parent=parent,
                snapshot=found,
            )
        self._hash().captured(*forked.instances)
        return forked

    async def snapshot_rm(self, request: SnapshotRmRequest) -> None:
        """Remove the snapshot when no operation uses it any more."""
        async with self._hold_snapshot(request.snapshot, shared=False) as found:
            await complete(self._remove_snapshot(found))

    async def _remove_snapshot(self, found: Snapshot) -> None:
        with contextlib.suppress(NoSpace):  # removal must work on a full disk
            await in_thread(self.rooms.store.snapshots.begin, found, JournalOperation.SNAPSHOT_REMOVE)
        await snapshot.remove(self.rooms, found.id)

    async def verify(self, _: VerifyRequest, progress: ProgressSink) -> VerifyReport:
        """Compare every file with its record."""
        require_operator(self.owner, "verify")
        from coppice.integrity import verify  # imports the disk tools, which few commands need

        return await verify.verify(self.rooms, progress)

    async def _snapshot(self, key: str) -> Snapshot:
        found = await in_thread(self.rooms.store.snapshots.get, key)
        if not owns(self.owner, found):
            raise no_snapshot(key)
        return found

    @contextlib.asynccontextmanager
    async def _hold_snapshot(self, key: str, *, shared: bool = True) -> AsyncIterator[Snapshot]:
        """Lock a snapshot: shared, to keep it from being removed; exclusively, to remove it."""
        found = await self._snapshot(key)
        lock = self.rooms.layout.lock(found.id)
        with untranslated(f"use the snapshot {found.name}"):
            async with locks.hold(lock, shared=shared, deadline_s=self.rooms.deadlines.lock, what=found.name):
                with locks.of_record(lock, f"the snapshot {found.name}"):
                    found = await self._snapshot(found.id)
                yield found
