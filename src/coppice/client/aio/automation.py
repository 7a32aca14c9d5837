# Written by tools/generate_client.py: change coppice.requests, then run it.

"""What a supervisor does by itself with a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from coppice.client.aio.base import MachineBase
from coppice.model.automation import AutoStandbyStatus, SnapshotSchedule
from coppice.requests import (
    AutoStandbyHoldRequest,
    AutoStandbyRequest,
    SnapshotScheduleRequest,
    SnapshotScheduleRmRequest,
    SnapshotScheduleSetRequest,
)

if TYPE_CHECKING:
    pass


class MachineAutomation(MachineBase):
    """Automatic standbys and scheduled snapshots."""

    async def auto_standby(self) -> AutoStandbyStatus:
        """Return when an instance is put into standby automatically, and what keeps it awake.

        Commands that run without a client also keep it awake. The supervisor asks for them only
        when the time is over.
        """
        return await self._backend.call(AutoStandbyRequest(instance=self.id))

    async def auto_standby_hold(self) -> AutoStandbyStatus:
        """Keep an instance from an automatic standby for its idle time, from now on.

        Call this before you open a connection to an instance that may be idle: after success it
        runs until `hold_until` at least. Each hold replaces the one before. Without a policy of
        automatic standby, nothing is held.

        :raises InStandby: it is in standby, so restore it first
        """
        return await self._backend.call(AutoStandbyHoldRequest(instance=self.id))

    async def snapshot_schedule(self) -> SnapshotSchedule:
        """Return the snapshot schedule of an instance, with what became of its latest run.

        :raises NotFound: there is no such instance, or it has no schedule
        """
        return await self._backend.call(SnapshotScheduleRequest(instance=self.id))

    async def snapshot_schedule_set(
        self,
        interval_s: float,
        *,
        max_count: int | None = None,
        max_age_s: float | None = None,
        name_prefix: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> SnapshotSchedule:
        """Let a server take snapshots of an instance again and again, and remove old ones. This
        replaces its schedule.

        A Running instance is paused for each one, as by `snapshot`. A Stopped one gives snapshots
        of its disk. The next snapshot keeps its time if the interval stays the same.

        :param interval_s: Seconds between two snapshots, at least 60.
        :param max_count: Keep so many of its scheduled snapshots, the newest. Default: any number.
        :param max_age_s: Remove its scheduled snapshots after so many seconds, also when the
            instance is removed. Default: never. One of the two limits is needed.
        :param name_prefix: Beginning of the snapshots' names, at most 47 characters. Default: the
            instance's name.
        :param tags: Tags of the new records.
        """
        return await self._backend.call(
            SnapshotScheduleSetRequest(
                instance=self.id,
                interval_s=interval_s,
                max_count=max_count,
                max_age_s=max_age_s,
                name_prefix=name_prefix,
                tags={} if tags is None else tags,
            )
        )

    async def snapshot_schedule_rm(self) -> None:
        """Take no further scheduled snapshots of an instance. Those that exist are kept, whatever
        their age.

        :raises NotFound: there is no such instance, or it has no schedule
        """
        await self._backend.call(SnapshotScheduleRmRequest(instance=self.id))
