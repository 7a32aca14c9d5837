"""The journal: the operation that is changing an instance, snapshot or volume, and its process."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Self

from coppice.model import Record


class JournalOperation(StrEnum):
    """An operation of more than one transaction.

    Recovery chooses by it how to resolve an interrupted one.

    A new member needs a new schema version, so that an older Coppice does not open a journal that
    it cannot resolve.
    """

    RUN = "run"  # a new instance is being made: remove it
    FORK = "fork"  # a fork, or the stem that forks are made of: remove it
    REMOVE = "rm"  # finish the removal
    START = "start"  # bring the instance to rest
    RESTORE = "restore"  # bring the instance to rest
    STOP = "stop"  # bring the instance to rest
    STANDBY = "standby"  # not yet committed: let the guest run on
    STANDBY_COMMIT = "standby-commit"  # the capture is whole: put it into place
    MERGE = "merge"  # of the disk layers of an instance at rest: leave it as it is recorded
    FORK_RUNNING = "fork-running"  # the source's row: let its guest run on
    SNAPSHOT_RESTORE = "snapshot-restore"  # not yet committed: leave the instance as it was
    SNAPSHOT_RESTORE_COMMIT = "snapshot-restore-commit"  # the new files are whole: put them into place
    SNAPSHOT = "snapshot"  # a snapshot is being made: remove it
    SNAPSHOT_REMOVE = "snapshot-rm"  # finish the removal
    VOLUME = "volume"  # a volume is being made: remove it
    VOLUME_REMOVE = "volume-rm"  # finish the removal


COMMITS = frozenset({JournalOperation.STANDBY_COMMIT, JournalOperation.SNAPSHOT_RESTORE_COMMIT})
"""The operations that commit.

Their rows are on disk before files are renamed, or a power cut could leave new files under the old
record.
"""
OF_SNAPSHOTS = frozenset({JournalOperation.SNAPSHOT, JournalOperation.SNAPSHOT_REMOVE})
OF_VOLUMES = frozenset({JournalOperation.VOLUME, JournalOperation.VOLUME_REMOVE})


class JournalEntry(Record, frozen=True, kw_only=True):
    """An operation under way, or an interrupted one."""

    instance: str  # or the id of a snapshot or volume
    operation: JournalOperation
    owner_pid: int
    owner_ticks: int
    started_at: float

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Return the entry of a row of the journal, whose columns are in the order of the fields."""
        instance, operation, pid, ticks, started_at = row
        return cls(
            instance=instance,
            operation=JournalOperation(operation),
            owner_pid=pid,
            owner_ticks=ticks,
            started_at=started_at,
        )
