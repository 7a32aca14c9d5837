"""Requests about what a supervisor does by itself with an instance: automatic standbys and scheduled snapshots."""

from typing import Annotated, Final

from msgspec import Meta

from coppice.errors import UsageError
from coppice.model.automation import AutoStandbyStatus, SnapshotSchedule
from coppice.names import MAX_SECONDS, check_name, check_tags
from coppice.requests.base import InstanceRequest, Tags

_SHORTEST_S: Final = 60.0
_LONGEST_PREFIX: Final = 47
_MOST: Final = 100_000


class AutoStandbyRequest(InstanceRequest[AutoStandbyStatus], frozen=True, kw_only=True):
    """Return when an instance is put into standby automatically, and what keeps it awake.

    Commands that run without a client also keep it awake. The supervisor asks for them only when the time is over.
    """


class AutoStandbyHoldRequest(InstanceRequest[AutoStandbyStatus], frozen=True, kw_only=True):
    """Keep an instance from an automatic standby for its idle time, from now on.

    Call this before you open a connection to an instance that may be idle: after success it runs until
    `hold_until` at least. Each hold replaces the one before. Without a policy of automatic standby,
    nothing is held.

    :raises InStandby: it is in standby, so restore it first
    """


class SnapshotScheduleRequest(InstanceRequest[SnapshotSchedule], frozen=True, kw_only=True):
    """Return the snapshot schedule of an instance, with what became of its latest run.

    :raises NotFound: there is no such instance, or it has no schedule
    """


class SnapshotScheduleSetRequest(InstanceRequest[SnapshotSchedule], frozen=True, kw_only=True):
    """Let a server take snapshots of an instance again and again, and remove old ones. This replaces its schedule.

    A Running instance is paused for each one, as by `snapshot`. A Stopped one gives snapshots of its disk. The
    next snapshot keeps its time if the interval stays the same.
    """

    interval_s: Annotated[float, Meta(description="Seconds between two snapshots, at least 60.")]
    max_count: Annotated[
        int | None, Meta(description="Keep so many of its scheduled snapshots, the newest. Default: any number.")
    ] = None
    max_age_s: Annotated[
        float | None,
        Meta(
            description="Remove its scheduled snapshots after so many seconds, also when the instance is removed. "
            "Default: never. One of the two limits is needed."
        ),
    ] = None
    name_prefix: Annotated[
        str | None,
        Meta(description="Beginning of the snapshots' names, at most 47 characters. Default: the instance's name."),
    ] = None
    tags: Tags = {}

    def check(self) -> None:
        """Also check the times, the limits, the prefix and the tags."""
        super().check()
        if not _SHORTEST_S <= self.interval_s <= MAX_SECONDS:
            raise UsageError(f"an interval of {self.interval_s:g} s is out of range", hint="give a minute to 366 days")
        if not self.max_count and not self.max_age_s:
            raise UsageError("the snapshots of a schedule need a limit", hint="give a number or an age to keep")
        if not 0 <= (self.max_count or 0) <= _MOST:
            raise UsageError(f"{self.max_count} snapshots cannot be kept", hint=f"give 1 to {_MOST}")
        if not 0 <= (self.max_age_s or 0.0) <= MAX_SECONDS:
            raise UsageError(f"an age of {self.max_age_s:g} s is out of range", hint="give at most 366 days")
        if self.name_prefix:
            if len(self.name_prefix) > _LONGEST_PREFIX:
                raise UsageError(
                    f"the prefix of names has {len(self.name_prefix)} characters",
                    hint=f"give {_LONGEST_PREFIX} at most",
                )
            check_name(self.name_prefix)
        check_tags(self.tags)


class SnapshotScheduleRmRequest(InstanceRequest[None], frozen=True, kw_only=True):
    """Take no further scheduled snapshots of an instance. Those that exist are kept, whatever their age.

    :raises NotFound: there is no such instance, or it has no schedule
    """
