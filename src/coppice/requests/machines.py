"""Requests that change an instance: run, start, stop, standby, restore, promote, update, rm."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from coppice.addresses import check_egress, check_notify, check_publish
from coppice.commands import check_workdir
from coppice.model import GIB, MIB, Egress, EgressReport, Instance, Limits, Publish, VolumeMount
from coppice.model.inspection import StandbyReport
from coppice.names import (
    check_argv,
    check_env,
    check_grace,
    check_limits,
    check_machine,
    check_mounts,
    check_name,
    check_recorded,
    check_tags,
)
from coppice.requests.base import SECRET, Certificates, InstanceRequest, Notify, Request, Tags
from coppice.requests.supervision import (
    AutoStandbyS,
    ExpiresAt,
    HealthCheckOption,
    OnExpiryOption,
    Restart,
    TtlS,
    check_expiry,
    check_policies,
)
from coppice.trust import certificates_in, check_guest_proxy


class RunRequest(Request[Instance], frozen=True, kw_only=True):
    """Make an instance of an image and boot it. Return when its agent has answered.

    If it fails, nothing is left behind.

    :raises NotFound: there is no such image, volume or kernel
    :raises NameTaken: the name is in use
    :raises InUse: a volume is attached to another instance and one of the two writes to it, or
        another program uses a port to publish
    :raises NoSpace: a budget is exceeded, or the disk is full
    :raises VmmDied: the machine ended before its agent answered
    :raises GuestTimeout: the agent did not answer in time
    """

    reports_progress: ClassVar[bool] = True
    positional: ClassVar[tuple[str, ...]] = ("command",)

    image: Annotated[str, Meta(description="Name, digest or unique prefix of the digest of an image.")]
    command: Annotated[
        Sequence[str], Meta(description="Replaces the image's command; its entrypoint stays, as in OCI runtimes.")
    ] = ()
    entrypoint: Annotated[
        Sequence[str] | None,
        Meta(description="Replaces the image's entrypoint and its command. Default: the image's."),
    ] = None
    name: Annotated[str | None, Meta(description="Name of the instance. Default: generated.")] = None
    cpus: Annotated[int, Meta(description="Virtual CPUs.")] = 1
    memory_bytes: Annotated[int, Meta(description="RAM, in whole MiB.")] = 512 * MIB
    overlay_bytes: Annotated[int, Meta(description="Size of its own writable disk, in whole MiB.")] = 2 * GIB
    env: Annotated[
        Mapping[str, str], Meta(description="Variables of its process, added to the image's.", extra=SECRET)
    ] = {}
    workdir: Annotated[
        str | None, Meta(description="Working directory of its process, an absolute path. Default: the image's.")
    ] = None
    user: Annotated[
        str | None, Meta(description="User of its process: a name, UID, or UID:GID. Default: the image's.")
    ] = None
    hostname: Annotated[str | None, Meta(description="Host name in the guest. Default: the instance's name.")] = None
    tags: Tags = {}
    publish: Annotated[Sequence[Publish], Meta(description="Ports of this host to forward to the guest.")] = ()
    network: Annotated[
        str | None,
        Meta(
            description="`nat` for its own subnet with an egress policy, `user`, `passt`, or `none` for no NIC. Default: `nat` "
            "if the host can provide it, else `user` if the VMM can attach it."
        ),
    ] = None
    egress: Annotated[
        Egress | None, Meta(description="Egress policy of the guest, on a network that enforces it. Default: all.")
    ] = None
    limits: Annotated[
        Limits | None,
        Meta(description="Limits of its VMM, enforced by a control group, which the host must permit. Default: none."),
    ] = None
    vmm: Annotated[str | None, Meta(description="Name of its VMM: `qemu` or `firecracker`. Default: the host's.")] = (
        None
    )
    volumes: Annotated[
        Sequence[VolumeMount],
        Meta(description="Volumes to mount before its process starts. They stay attached until it is removed."),
    ] = ()
    certificates: Certificates = ()
    proxy: Annotated[
        str | None,
        Meta(
            description="URL of an HTTP proxy. All processes of the guest get it as http_proxy, https_proxy and their "
            "like.",
            extra=SECRET,
        ),
    ] = None
    kernel: Annotated[
        str | None, Meta(description="Key of an added kernel. Default: Debian's, fetched at first use.")
    ] = None
    start: Annotated[bool, Meta(description="False: do not boot the instance; it is Stopped.")] = True
    pull: Annotated[
        Literal["missing", "always", "never"],
        Meta(
            description="When to pull the image. `missing`: if it is missing and its name begins with a registry, as "
            "in `docker.io/library/alpine`."
        ),
    ] = "missing"
    notify: Notify = None
    ttl_s: TtlS = None
    expires_at: ExpiresAt = None
    on_expiry: OnExpiryOption = None
    restart: Restart = None
    health_check: HealthCheckOption = None
    auto_standby_s: AutoStandbyS = None

    def check(self) -> None:
        """Check names, sizes and all values that are recorded."""
        check_machine(self.cpus, self.memory_bytes, self.overlay_bytes)
        for name in (self.name, self.hostname):
            if name is not None:
                check_name(name)
        check_recorded(
            *check_argv(self.command),
            *check_argv(self.entrypoint or ()),
            *check_env(self.env).values(),
            self.workdir or "",
            self.user or "",
        )
        check_workdir(self.workdir)
        check_mounts(self.volumes)
        check_tags(self.tags)
        check_publish(self.publish)
        check_egress(self.egress)
        check_limits(self.limits)
        certificates_in(self.certificates)
        check_guest_proxy(self.proxy)
        check_notify(self.notify)
        check_policies(self)


class StartRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Boot a Stopped instance from its disk. A Running instance keeps running, as with `restore`.

    Another command is recorded, and so is that of later boots too.

    :raises IllegalTransition: a Running instance is to run another command
    :raises NotFound: the command needs the image's entrypoint, and the image was removed
    :raises VmmDied: the machine ended before its agent answered; it is Stopped again
    :raises InUse: another program uses a port that the instance publishes
    """

    reports_progress: ClassVar[bool] = True

    command: Annotated[
        Sequence[str] | None,
        Meta(description="Another command for its process; the image's entrypoint stays. Default: unchanged."),
    ] = None
    entrypoint: Annotated[
        Sequence[str] | None,
        Meta(description="Another entrypoint, which also replaces the image's command. Default: unchanged."),
    ] = None
    ttl_s: TtlS = None
    expires_at: ExpiresAt = None
    on_expiry: OnExpiryOption = None

    def check(self) -> None:
        """Also check the command and the expiry."""
        super().check()
        check_recorded(*check_argv(self.command or ()), *check_argv(self.entrypoint or ()))
        check_expiry(self)


class RestoreRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Continue a Standby instance from its captured memory.

    A Running instance keeps running. If its VMM has paused it because of a full disk, it is
    resumed.

    :raises IntegrityError: the capture was changed, or was made on another kind of host
    :raises InUse: another program uses a port that the instance publishes; it stays Standby
    """


class StopRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Power off a guest. Its memory is lost; its disk is kept."""

    grace_s: Annotated[
        float | None,
        Meta(description="Seconds for the guest to power off. 0: end it at once. Default: 30."),
    ] = None

    def check(self) -> None:
        """Also check the grace period."""
        super().check()
        check_grace(self.grace_s)


class StandbyRequest(InstanceRequest[StandbyReport], frozen=True, kw_only=True):
    """Capture a Running instance and end its VMM. It uses no process and no RAM until `restore`.

    A Standby instance stays as it is. If the capture fails, the guest keeps running.
    """


class PromoteRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Make a Standby instance a Template, which can only be forked. `demote` reverses it.

    A Template stays a Template.
    """

    public: Annotated[
        bool | None,
        Meta(
            description="True: other owners may also fork it, and so share its memory. False: they may not; existing "
            "forks are kept."
        ),
    ] = None
    notify: Notify = None

    def check(self) -> None:
        """Also check the endpoint."""
        super().check()
        check_notify(self.notify)


class DemoteRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Make a Template a Standby instance again.

    :raises InUse: the template has forks; the message names them
    """


class EgressRequest(InstanceRequest[EgressReport], frozen=True, kw_only=True):
    """Return a guest's egress policy and the refused destinations.

    Change the policy if one is given.

    The new policy applies from the next packet, and ends connections that it does not allow.
    Published ports keep working.

    :raises UsageError: the instance's network does not enforce egress policies
    """

    positional: ClassVar[tuple[str, ...]] = ("policy",)

    policy: Annotated[Egress | None, Meta(description="The new policy. Default: keep the current one.")] = None

    def check(self) -> None:
        """Also check the policy."""
        super().check()
        check_egress(self.policy)


class UpdateRequest(InstanceRequest[Instance], frozen=True, kw_only=True):
    """Change the policies of an instance, in any state. What is not given stays as it is.

    :raises Expired: the instance has expired already
    """

    ttl_s: TtlS = None
    expires_at: ExpiresAt = None
    on_expiry: OnExpiryOption = None
    restart: Restart = None
    health_check: HealthCheckOption = None
    auto_standby_s: AutoStandbyS = None

    def check(self) -> None:
        """Also check the policies."""
        super().check()
        check_policies(self)


class RmRequest(InstanceRequest[None], frozen=True, kw_only=True):
    """Remove an instance in any state: its VMM, its directory, its record.

    Its forks keep the shared memory, and its volumes keep their content.

    :raises InUse: the instance is a template with forks; the message names them
    """
