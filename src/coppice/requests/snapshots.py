"""Requests for snapshots: saved states of instances."""

from typing import Annotated

from msgspec import Meta

from coppice.model import Instance, Snapshot, SnapshotKind
from coppice.model.inspection import SnapshotInspection
from coppice.names import check_name, check_reference, check_tags
from coppice.requests.base import InstanceRequest, R, Request, TagFilter, Tags


class SnapshotRequest(InstanceRequest[Snapshot], frozen=True, kw_only=True):
    """Save the current state of an instance as a snapshot, which never changes and outlives the
    instance.

    A Running instance is paused for `pause_ms`, and then continues. If the snapshot fails, nothing
    is left behind.

    :raises NameTaken: another snapshot has the name
    :raises IllegalTransition: the instance has no memory for a Standby snapshot, or is changing its
        state
    """

    name: Annotated[str | None, Meta(description="Name of the snapshot. Default: generated.")] = None
    kind: Annotated[
        SnapshotKind | None,
        Meta(
            description="Standby: memory and disk. Stopped: only the disk. Default: Stopped for a Stopped instance, else "
            "Standby."
        ),
    ] = None
    tags: Tags = {}

    def check(self) -> None:
        """Check the names and tags."""
        super().check()
        if self.name is not None:
            check_name(self.name)
        check_tags(self.tags)


class KeptRequest(Request[R], frozen=True, kw_only=True):
    """A request that concerns one snapshot."""

    snapshot: Annotated[str, Meta(description="Name or id of the snapshot.")]

    def check(self) -> None:
        """Check the name or id."""
        check_reference(self.snapshot)


class SnapshotLsRequest(Request[list[Snapshot]], frozen=True, kw_only=True):
    """Return the owner's snapshots, oldest first."""

    source: Annotated[
        str | None, Meta(description="Return only snapshots of this instance, which may be removed: name or id.")
    ] = None
    tags: TagFilter = {}


class SnapshotInspectRequest(KeptRequest[SnapshotInspection], frozen=True, kw_only=True):
    """Return one snapshot with its sizes, its links and its forks.

    :raises NotFound: there is no such snapshot
    """


class SnapshotRestoreRequest(KeptRequest[Instance], frozen=True, kw_only=True):
    """Reset an instance to its snapshot. Its current memory and disk are lost; a Running one is
    ended.

    The instance is Standby afterwards, or Stopped if the snapshot has no memory. To keep the
    current state, fork the snapshot instead.

    :raises NotFound: there is no such snapshot, or its instance was removed
    :raises IllegalTransition: the instance is a template
    :raises IntegrityError: the snapshot's memory differs from the captured memory
    """

    start: Annotated[bool, Meta(description="Start the instance afterwards.")] = False


class SnapshotRmRequest(KeptRequest[None], frozen=True, kw_only=True):
    """Remove a snapshot. Its instance and its forks keep their memory and disks.

    :raises NotFound: there is no such snapshot
    """
