"""Requests that make forks."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from coppice.addresses import check_egress, check_notify, check_publish, check_publish_many
from coppice.model import Egress, ForkReport, Limits, Publish, State
from coppice.names import (
    check_children,
    check_count,
    check_limits,
    check_payloads,
    check_reference,
    check_spares,
    check_tags,
    check_target,
)
from coppice.requests.base import SECRET, InstanceKey, InstanceRequest, Notify, Request, Tags
from coppice.requests.supervision import (
    AutoStandbyS,
    ExpiresAt,
    HealthCheckOption,
    OnExpiryOption,
    Restart,
    TtlS,
    check_policies,
)

VolumePolicy = Literal["refuse", "clone"]


class FanOut(Request[ForkReport], frozen=True, kw_only=True):
    """The parameters of all requests for forks."""

    reports_progress: ClassVar[bool] = True
    positional: ClassVar[tuple[str, ...]] = ("count",)

    count: Annotated[int, Meta(description="How many forks to grow, in parallel.")] = 1
    names: Annotated[
        Sequence[str],
        Meta(description="One name per fork, or one name that gets numbered. Default: generated."),
    ] = ()
    target: Annotated[State, Meta(description="State of the forks: Running, Standby or Stopped.")] = State.RUNNING
    atomic: Annotated[bool, Meta(description="All or none: a failure undoes all forks and is raised.")] = False
    vmm: Annotated[
        str | None,
        Meta(
            description="VMM of the forks. Default: the source's. Another VMM cannot use the source's memory: the source "
            "or the target must be Stopped."
        ),
    ] = None
    tags: Tags = {}
    publish: Annotated[
        Sequence[Publish],
        Meta(
            description="Ports of this host to forward to each fork. Several forks need the address `own` or the "
            "port 0; each fork's record has its actual ports."
        ),
    ] = ()
    egress: Annotated[
        Egress | None,
        Meta(description="Egress policy of each fork, on a network that enforces it. Default: its source's."),
    ] = None
    limits: Annotated[
        Limits | None,
        Meta(
            description="Limits of the VMM of each fork, which replace all limits of its source. Default: its source's."
        ),
    ] = None
    measure: Annotated[bool, Meta(description="Also report each fork's memory, as `stats` does later.")] = False
    payload: Annotated[
        bytes | None,
        Meta(
            description="At most 1 MiB, written to /run/coppice/payload in each fork before the image's "
            "/etc/coppice/on-fork runs. It is stored nowhere else.",
            extra=SECRET,
        ),
    ] = None
    payloads: Annotated[
        Sequence[bytes], Meta(description="A payload for each fork, instead of one for all.", extra=SECRET)
    ] = ()
    notify: Notify = None
    ttl_s: TtlS = None
    expires_at: ExpiresAt = None
    on_expiry: OnExpiryOption = None
    restart: Restart = None
    health_check: HealthCheckOption = None
    auto_standby_s: AutoStandbyS = None

    def check(self) -> None:
        """Check the parameters of the forks, not their source."""
        check_count(self.count)
        check_target(self.target)
        check_payloads(self.payload, self.payloads, self.count, self.target)
        check_publish_many(check_publish(self.publish), self.count)
        check_children(self.names, self.count)
        check_tags(self.tags)
        check_egress(self.egress)
        check_limits(self.limits)
        check_notify(self.notify)
        check_policies(self)

    @property
    def child_names(self) -> tuple[str, ...]:
        """The name of each fork; empty if names are generated."""
        return check_children(self.names, self.count)

    @property
    def child_payloads(self) -> tuple[bytes | None, ...]:
        """The payload of each fork, or None."""
        return check_payloads(self.payload, self.payloads, self.count, self.target)


class ForkRequest(FanOut, frozen=True, kw_only=True):
    """Grow forks from a Template, a Standby or a Stopped instance, in parallel. Each has its own
    result.

    A fork of captured memory shares the source's mem-file by hard link. It is Running when its
    agent has confirmed its new identity. A fork that fails is undone and does not affect the
    others. A fork fails if its on-fork hook fails or takes longer than 30 s, and so with the process
    that `notify` names.

    :raises IllegalTransition: the source's state does not allow a fork
    :raises InUse: the source writes to a volume, and the policy is `refuse`
    :raises NoSpace: the forks exceed a budget; none was made
    """

    instance: InstanceKey
    from_running: Annotated[
        bool,
        Meta(description="Fork a Running instance. It is paused, and then continues; the report has the time."),
    ] = False
    volume_policy: Annotated[
        VolumePolicy,
        Meta(
            description="What happens to volumes that the source writes to. `refuse`: such a source is not forked. "
            "`clone`: each fork gets a copy-on-write clone of its own, which is removed with the fork."
        ),
    ] = "refuse"

    def check(self) -> None:
        """Also check the source's name."""
        super().check()
        check_reference(self.instance)

    @property
    def clones_volumes(self) -> bool:
        """Whether a source that writes to a volume can be forked."""
        return self.volume_policy == "clone"


class SnapshotForkRequest(FanOut, frozen=True, kw_only=True):
    """Grow forks from a snapshot, as `fork` does from an instance.

    The parent of the forks is the snapshot's instance, if it still exists.

    :raises NotFound: there is no such snapshot
    :raises IllegalTransition: the target is Standby and the snapshot has no memory
    :raises NoSpace: the forks exceed a budget; none was made
    """

    snapshot: Annotated[str, Meta(description="Name or id of the snapshot.")]

    def check(self) -> None:
        """Also check the snapshot's name."""
        super().check()
        check_reference(self.snapshot)


class StartAheadRequest(InstanceRequest[int], frozen=True, kw_only=True):
    """Start VMMs ahead for the next forks of a template. Return how many VMMs wait.

    They are kept for half a minute. Each has loaded the template's state, but its guest has not
    run. A fork that takes such a VMM is ready sooner, and equal to any other fork. A fork that
    publishes ports does not take one.

    :raises NoSpace: the forks exceed a budget; VMMs that were started before the failure wait
    :raises NotSupported: the instance is not a template, has volumes, or its VMM does not support
        this
    """

    positional: ClassVar[tuple[str, ...]] = ("count",)

    count: Annotated[int, Meta(description="How many VMMs to keep waiting.")] = 1

    def check(self) -> None:
        """Also check the number."""
        super().check()
        check_spares(self.count)
