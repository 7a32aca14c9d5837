"""Requests that read instances, and requests for the whole data directory or this machine."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from coppice.model import BudgetUse, Check, GcReport, Instance, MemoryReport, State, TreeNode, VerifyReport
from coppice.model.events import Event
from coppice.model.inspection import Inspection
from coppice.names import check_limit, check_reference
from coppice.requests.base import InstanceRequest, Request, StreamRequest, TagFilter


class GetRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Return the instance in its true state, which includes a check whether its VMM still runs.

    :raises NotFound: there is no such instance
    """


class LsRequest(Request[list[Instance]], frozen=True, kw_only=True):
    """Return the owner's instances, oldest first. The operator sees all.

    An instance whose true state cannot be determined now is Unknown.
    """

    state: Annotated[State | None, Meta(description="Return only instances in this state.")] = None
    tags: TagFilter = {}


class InspectRequest(InstanceRequest[Inspection], frozen=True, kw_only=True):
    """Return one instance with its forks, its disk, and its memory as the kernel accounts it."""


class StatsRequest(Request[dict[str, MemoryReport]], frozen=True, kw_only=True):
    """Return the memory of each instance that holds memory, and the traffic of each that is Running, by name.

    Where only a guest counts the traffic, it is asked if its instance is the only one that is wanted.
    """

    positional: ClassVar[tuple[str, ...]] = ("instance",)

    instance: Annotated[str | None, Meta(description="Return only this instance: name or id.")] = None

    def check(self) -> None:
        """Check the name or id."""
        if self.instance is not None:
            check_reference(self.instance)


class TreeRequest(Request[list[TreeNode]], frozen=True, kw_only=True):
    """Return the lineage in the order of a drawn tree: each instance is followed by its forks.

    An instance whose parent was removed is a root.
    """

    positional: ClassVar[tuple[str, ...]] = ("instance",)

    instance: Annotated[str | None, Meta(description="Return only this instance and its forks: name or id.")] = None

    def check(self) -> None:
        """Check the name or id."""
        if self.instance is not None:
            check_reference(self.instance)


class UnloadableRequest(Request[dict[str, str]], frozen=True, kw_only=True):
    """Return the captures that can no longer be loaded here: the reason by instance or snapshot
    id.

    Either the VMM was updated after the capture, or this host is of another kind.
    """

    positional: ClassVar[tuple[str, ...]] = ("holders",)

    holders: Annotated[
        Sequence[str] | None, Meta(description="Check only these instances and snapshots, by id. Default: all.")
    ] = None


class BudgetRequest(Request[BudgetUse], frozen=True, kw_only=True):
    """Return the budgets of the data directory, and how much of them all owners use."""


class VerifyRequest(Request[VerifyReport], frozen=True, kw_only=True):
    """Check that captured mem-files and disks at rest, volumes included, are unchanged. Report
    differences.

    Compare inode, size, mode and SHA-256, and run e2fsck on disks that no machine uses. A SHA-256
    that was not computed yet is recorded for the next check. Files are neither changed nor
    repaired.

    :raises MissingTool: e2fsck is not installed
    :raises Refused: the host has an owner; only the operator may read the files of all owners
    """

    reports_progress: ClassVar[bool] = True


class GcRequest(Request[GcReport], frozen=True, kw_only=True):
    """Remove leftovers of killed processes: directories, lock files and VMMs without a record, and
    temporary files of builds and checks.

    Nothing that is in use, or may soon be in use, is removed.

    :raises Refused: the host has an owner; only the operator may remove leftovers
    :raises Busy: operations are under way that may need a cache
    """

    dry_run: Annotated[bool, Meta(description="Only report what would be removed.")] = False
    caches: Annotated[
        bool,
        Meta(
            description="Also remove unused content that can be made or fetched again: fetched kernels, boot "
            "files, empty disks, images without a name."
        ),
    ] = False


class EventsRequest(StreamRequest[AsyncIterator[Event]], frozen=True, kw_only=True):
    """Yield what happened to the owner's instances: made, changed state, removed. The operator sees
    all.

    The newest 20,000 events are kept. If the next event is no longer kept, the first one yielded is
    `lost`: list the instances again.
    """

    after: Annotated[
        int | None, Meta(description="Begin after the event with this id. Default: all; if following, only new ones.")
    ] = None
    follow: Annotated[bool, Meta(description="Wait for new events.")] = False

    def check(self) -> None:
        """Check the id."""
        if self.after is not None:
            check_limit(self.after)


class DoctorRequest(Request[list[Check]], frozen=True, kw_only=True):
    """Check this host. Return one result per check, with a command that fixes it. The host need not
    be open.
    """
