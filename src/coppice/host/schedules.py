"""Snapshots by a schedule, and the removal of those that it no longer keeps."""

from __future__ import annotations

import logging
import time
from typing import Final

from coppice.completion import in_thread
from coppice.errors import Busy, CoppiceError, NotFound
from coppice.host.snapshots import Snapshots
from coppice.model import Instance, Snapshot
from coppice.model.automation import SnapshotSchedule
from coppice.model.ownership import no_instance, owns
from coppice.names import new_name
from coppice.requests import (
    SnapshotRequest,
    SnapshotRmRequest,
    SnapshotScheduleRequest,
    SnapshotScheduleRmRequest,
    SnapshotScheduleSetRequest,
)
from coppice.state import locks

_log = logging.getLogger(__name__)
_AGAIN_S: Final = 60.0  # after a snapshot could not be removed
_LONGEST_ERROR: Final = 500


class Schedules(Snapshots):
    """The snapshot schedules of instances."""

    async def snapshot_schedule(self, request: SnapshotScheduleRequest) -> SnapshotSchedule:
        """Read the schedule."""
        instance = await self._current(request.instance)
        found = await in_thread(self.rooms.store.supervised.schedules.get, instance.id)
        if found is None:
            raise _no_schedule(instance)
        return found

    async def snapshot_schedule_set(self, request: SnapshotScheduleSetRequest) -> SnapshotSchedule:
        """Record the schedule. The supervisor looks at it at once."""
        instance = await self._current(request.instance)
        now = time.time()
        wanted = SnapshotSchedule(
            instance=instance.id,
            interval_s=request.interval_s,
            max_count=request.max_count or 0,
            max_age_s=request.max_age_s or 0.0,
            name_prefix=request.name_prefix or "",
            tags=dict(request.tags),
            created_at=now,
            updated_at=now,
            next_run_at=now + request.interval_s,
        )
        return await in_thread(self.rooms.store.supervised.schedules.put, wanted)

    async def snapshot_schedule_rm(self, request: SnapshotScheduleRmRequest) -> None:
        """Forget the schedule. Its snapshots stay."""
        instance = await self._current(request.instance)
        if not await in_thread(self.rooms.store.supervised.schedules.remove, instance.id):
            raise _no_schedule(instance)

    # ---- what the supervisor does ----

    async def attend_schedule(self, key: str, now: float) -> None:
        """Take the snapshot of an instance that is due, remove those that are no longer kept, and record when
        to look again.

        :raises NotFound: the instance is not of this host's owner
        """
        schedule = await in_thread(self.rooms.store.supervised.schedules.get, key)
        if schedule is None:
            return
        instance = await self._source(key)
        if instance is not None and not now < schedule.next_run_at <= now + schedule.interval_s:
            await self._run(instance, schedule, now)
            schedule = await in_thread(self.rooms.store.supervised.schedules.get, key)
            if schedule is None:  # removed meanwhile, so all snapshots stay
                return
        due = await self._prune(schedule, now)
        if instance is not None:
            due = min(due or schedule.next_run_at, schedule.next_run_at)
        if due is not None:
            await in_thread(self.rooms.store.supervised.schedules.look_again, schedule, due)
        else:
            await in_thread(self.rooms.store.supervised.schedules.remove, key)

    async def _source(self, key: str) -> Instance | None:
        """Return the instance of a schedule; None if it was removed."""
        try:
            found = await in_thread(self.rooms.store.get, key)
        except NotFound:
            return None
        if not owns(self.owner, found):
            raise no_instance(key)
        return found

    async def _run(self, instance: Instance, schedule: SnapshotSchedule, now: float) -> None:
        """Take a snapshot, and record what became of it."""
        begun = await in_thread(self.rooms.store.supervised.schedules.begin, schedule, now)
        if begun is None:
            return
        name = new_name(begun.name_prefix or instance.name)
        try:
            request = SnapshotRequest(instance=instance.id, name=name, tags=begun.tags)
            made = (await self._save(request, scheduled=True)).id
            error = ""
        except CoppiceError as failure:
            _log.warning("no scheduled snapshot of %s: %s", instance.name, failure)
            made, error = None, str(failure)[:_LONGEST_ERROR]
        await in_thread(self.rooms.store.supervised.schedules.ran, instance.id, made, error)

    async def _prune(self, schedule: SnapshotSchedule, now: float) -> float | None:
        """Remove the snapshots that a schedule no longer keeps. Return when the next one has its age; None: no
        snapshot waits for that.
        """
        found = [
            each
            for each in await in_thread(self.rooms.store.snapshots.all)
            if each.scheduled and each.source == schedule.instance
        ]
        # The oldest first. A snapshot of the future, other than the latest, is from before the clock was set back.
        found.sort(key=lambda each: (each.id == schedule.last_snapshot, each.created_at <= now, each.created_at))
        surplus = len(found) - schedule.max_count if schedule.max_count else 0
        again: list[float] = []
        for place, each in enumerate(found):
            too_old = schedule.max_age_s and each.created_at + schedule.max_age_s <= now
            if (place < surplus or too_old) and not await self._removed(each):
                again.append(now + _AGAIN_S)
            elif schedule.max_age_s and not too_old:
                again.append(min(each.created_at, now) + schedule.max_age_s)
        return min(again, default=None)

    async def _removed(self, snapshot: Snapshot) -> bool:
        """Remove a snapshot. Return whether it is gone: an operation may use it, or its removal fails. The others
        are removed nevertheless, and none waits for an operation.
        """
        if await in_thread(locks.is_held, self.rooms.layout.lock(snapshot.id)):
            return False
        try:
            await self.snapshot_rm(SnapshotRmRequest(snapshot=snapshot.id))
        except NotFound:
            pass
        except Busy:
            return False
        except CoppiceError as failure:
            _log.warning("cannot remove the scheduled snapshot %s: %s", snapshot.name, failure)
            return False
        return True


def _no_schedule(instance: Instance) -> NotFound:
    return NotFound(
        f"{instance.name} has no snapshot schedule",
        hint=f"`coppice snapshot schedule set {instance.name} --every 1h --keep 24` makes one",
    )
