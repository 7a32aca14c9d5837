# Written by tools/generate_client.py from client/aio: change that, then run it.

"""Operations that change or fork a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from coppice.client.blocking.base import MachineBase
from coppice.model import (
    CaptureReport,
    Egress,
    EgressReport,
    HealthCheck,
    Limits,
    ProgressSink,
    Publish,
    RestartPolicy,
    Snapshot,
    SnapshotKind,
    State,
    no_progress,
)

if TYPE_CHECKING:
    from coppice.client.blocking.forks import Forks
    from coppice.client.blocking.machine import Machine


class MachineLifecycle(MachineBase):
    """The operations that change or fork a machine."""

    def start(
        self,
        *,
        command: Sequence[str] | None = None,
        entrypoint: Sequence[str] | None = None,
        ttl_s: float | None = None,
        expires_at: float | None = None,
        on_expiry: Literal["remove", "standby", "stop"] | None = None,
        progress: ProgressSink = no_progress,
    ) -> Self:
        """Boot a Stopped instance from its disk. A Running instance keeps running, as with `restore`.

        Another command is recorded, and so is that of later boots too.

        :param command: Another command for its process; the image's entrypoint stays. Default:
            unchanged.
        :param entrypoint: Another entrypoint, which also replaces the image's command. Default:
            unchanged.
        :param ttl_s: Seconds from now after which the instance expires; 0: never. Default:
            unchanged.
        :param expires_at: Time at which the instance expires, in seconds since the epoch; instead
            of a TTL.
        :param on_expiry: What happens then: `remove`, `standby` or `stop`. Default: unchanged, or
            remove.
        :param progress: Called with each step of the work.
        :raises IllegalTransition: a Running instance is to run another command
        :raises NotFound: the command needs the image's entrypoint, and the image was removed
        :raises VmmDied: the machine ended before its agent answered; it is Stopped again
        :raises InUse: another program uses a port that the instance publishes
        """
        self._portal.call(
            self._twin.start(
                command=command,
                entrypoint=entrypoint,
                ttl_s=ttl_s,
                expires_at=expires_at,
                on_expiry=on_expiry,
                progress=progress,
            )
        )
        return self

    def restore(self) -> Self:
        """Continue a Standby instance from its captured memory.

        A Running instance keeps running. If its VMM has paused it because of a full disk, it is
        resumed.

        :raises IntegrityError: the capture was changed, or was made on another kind of host
        :raises InUse: another program uses a port that the instance publishes; it stays Standby
        """
        self._portal.call(self._twin.restore())
        return self

    def stop(self, *, grace_s: float | None = None) -> Self:
        """Power off a guest. Its memory is lost; its disk is kept.

        :param grace_s: Seconds for the guest to power off. 0: end it at once. Default: 30.
        """
        self._portal.call(self._twin.stop(grace_s=grace_s))
        return self

    def standby(self) -> CaptureReport:
        """Capture a Running instance and end its VMM. It uses no process and no RAM until `restore`.

        A Standby instance stays as it is. If the capture fails, the guest keeps running.
        """
        return self._portal.call(self._twin.standby())

    def promote(self, *, public: bool | None = None, notify: int | str | None = None) -> Self:
        """Make a Standby instance a Template, which can only be forked. `demote` reverses it.

        A Template stays a Template.

        :param public: True: other owners may also fork it, and so share its memory. False: they may
            not; existing forks are kept.
        :param notify: Address of a process that is warm in the source and is to know of each fork:
            a port of the guest's own loopback, or `unix:` and the path of a socket. Each fork of
            captured memory sends it one HTTP request, `POST /coppice/fork` with the payload as its
            body, and is Running only after an answer of 2xx. `none`: no request. Default: none; a
            fork: its source's.
        """
        self._portal.call(self._twin.promote(public=public, notify=notify))
        return self

    def demote(self) -> Self:
        """Make a Template a Standby instance again.

        :raises InUse: the template has forks; the message names them
        """
        self._portal.call(self._twin.demote())
        return self

    def egress(self, policy: Egress | None = None) -> EgressReport:
        """Return a guest's egress policy and the refused destinations.

        Change the policy if one is given.

        The new policy applies from the next packet, and ends connections that it does not allow.
        Published ports keep working.

        :param policy: The new policy. Default: keep the current one.
        :raises UsageError: the instance's network does not enforce egress policies
        """
        return self._portal.call(self._twin.egress(policy))

    def update(
        self,
        *,
        ttl_s: float | None = None,
        expires_at: float | None = None,
        on_expiry: Literal["remove", "standby", "stop"] | None = None,
        restart: RestartPolicy | None = None,
        health_check: HealthCheck | None = None,
        auto_standby_s: float | None = None,
    ) -> Self:
        """Change the policies of an instance, in any state. What is not given stays as it is.

        :param ttl_s: Seconds from now after which the instance expires; 0: never. Default:
            unchanged.
        :param expires_at: Time at which the instance expires, in seconds since the epoch; instead
            of a TTL.
        :param on_expiry: What happens then: `remove`, `standby` or `stop`. Default: unchanged, or
            remove.
        :param restart: When a machine that ended by itself is started again. Default: never; a
            fork: its source's.
        :param health_check: How to find out whether its service works. Default: no check; a fork:
            its source's.
        :param auto_standby_s: Put the machine into standby after so many seconds without a session,
            a running command or a connection to a published TCP port, and wake it at the next
            connection; 0: never. Default: never; a fork: its source's.
        :raises Expired: the instance has expired already
        """
        self._portal.call(
            self._twin.update(
                ttl_s=ttl_s,
                expires_at=expires_at,
                on_expiry=on_expiry,
                restart=restart,
                health_check=health_check,
                auto_standby_s=auto_standby_s,
            )
        )
        return self

    def rm(self) -> None:
        """Remove an instance in any state: its VMM, its directory, its record.

        Its forks keep the shared memory, and its volumes keep their content.

        :raises InUse: the instance is a template with forks; the message names them
        """
        self._portal.call(self._twin.rm())

    def fork(
        self,
        count: int = 1,
        *,
        names: Sequence[str] = (),
        target: State = State.RUNNING,
        atomic: bool = False,
        vmm: str | None = None,
        tags: Mapping[str, str] | None = None,
        publish: Sequence[Publish] = (),
        egress: Egress | None = None,
        limits: Limits | None = None,
        measure: bool = False,
        payload: bytes | None = None,
        payloads: Sequence[bytes] = (),
        notify: int | str | None = None,
        ttl_s: float | None = None,
        expires_at: float | None = None,
        on_expiry: Literal["remove", "standby", "stop"] | None = None,
        restart: RestartPolicy | None = None,
        health_check: HealthCheck | None = None,
        auto_standby_s: float | None = None,
        from_running: bool = False,
        volume_policy: Literal["refuse", "clone"] = "refuse",
        progress: ProgressSink = no_progress,
    ) -> Forks:
        """Grow forks from a Template, a Standby or a Stopped instance, in parallel. Each has its own
        result.

        A fork of captured memory shares the source's mem-file by hard link. It is Running when its
        agent has confirmed its new identity. A fork that fails is undone and does not affect the
        others. A fork fails if its on-fork hook fails or takes longer than 30 s, and so with the
        process that `notify` names.

        :param count: How many forks to grow, in parallel.
        :param names: One name per fork, or one name that gets numbered. Default: generated.
        :param target: State of the forks: Running, Standby or Stopped.
        :param atomic: All or none: a failure undoes all forks and is raised.
        :param vmm: VMM of the forks. Default: the source's. Another VMM cannot use the source's
            memory: the source or the target must be Stopped.
        :param tags: Tags of the new records.
        :param publish: Ports of this host to forward to each fork. Several forks need the address
            `own` or the port 0; each fork's record has its actual ports.
        :param egress: Egress policy of each fork, on a network that enforces it. Default: its
            source's.
        :param limits: Limits of the VMM of each fork, which replace all limits of its source.
            Default: its source's.
        :param measure: Also report each fork's memory, as `stats` does later.
        :param payload: At most 1 MiB, written to /run/coppice/payload in each fork before the
            image's /etc/coppice/on-fork runs. It is stored nowhere else.
        :param payloads: A payload for each fork, instead of one for all.
        :param notify: Address of a process that is warm in the source and is to know of each fork:
            a port of the guest's own loopback, or `unix:` and the path of a socket. Each fork of
            captured memory sends it one HTTP request, `POST /coppice/fork` with the payload as its
            body, and is Running only after an answer of 2xx. `none`: no request. Default: none; a
            fork: its source's.
        :param ttl_s: Seconds from now after which the instance expires; 0: never. Default:
            unchanged.
        :param expires_at: Time at which the instance expires, in seconds since the epoch; instead
            of a TTL.
        :param on_expiry: What happens then: `remove`, `standby` or `stop`. Default: unchanged, or
            remove.
        :param restart: When a machine that ended by itself is started again. Default: never; a
            fork: its source's.
        :param health_check: How to find out whether its service works. Default: no check; a fork:
            its source's.
        :param auto_standby_s: Put the machine into standby after so many seconds without a session,
            a running command or a connection to a published TCP port, and wake it at the next
            connection; 0: never. Default: never; a fork: its source's.
        :param from_running: Fork a Running instance. It is paused, and then continues; the report
            has the time.
        :param volume_policy: What happens to volumes that the source writes to. `refuse`: such a
            source is not forked. `clone`: each fork gets a copy-on-write clone of its own, which is
            removed with the fork.
        :param progress: Called with each step of the work.
        :raises IllegalTransition: the source's state does not allow a fork
        :raises InUse: the source writes to a volume, and the policy is `refuse`
        :raises NoSpace: the forks exceed a budget; none was made
        """
        return self._forks(
            self._portal.call(
                self._twin.fork(
                    count,
                    names=names,
                    target=target,
                    atomic=atomic,
                    vmm=vmm,
                    tags=tags,
                    publish=publish,
                    egress=egress,
                    limits=limits,
                    measure=measure,
                    payload=payload,
                    payloads=payloads,
                    notify=notify,
                    ttl_s=ttl_s,
                    expires_at=expires_at,
                    on_expiry=on_expiry,
                    restart=restart,
                    health_check=health_check,
                    auto_standby_s=auto_standby_s,
                    from_running=from_running,
                    volume_policy=volume_policy,
                    progress=progress,
                )
            )
        )

    def fork_one(
        self,
        *,
        name: str | None = None,
        target: State = State.RUNNING,
        vmm: str | None = None,
        tags: Mapping[str, str] | None = None,
        publish: Sequence[Publish] = (),
        egress: Egress | None = None,
        limits: Limits | None = None,
        measure: bool = False,
        payload: bytes | None = None,
        notify: int | str | None = None,
        ttl_s: float | None = None,
        expires_at: float | None = None,
        on_expiry: Literal["remove", "standby", "stop"] | None = None,
        restart: RestartPolicy | None = None,
        health_check: HealthCheck | None = None,
        auto_standby_s: float | None = None,
        from_running: bool = False,
        volume_policy: Literal["refuse", "clone"] = "refuse",
        progress: ProgressSink = no_progress,
    ) -> Machine:
        """Grow one fork, and return its machine. Raise the fork's error if it fails.

        Parameters and errors are those of `fork`.

        :param name: Name of the fork. Default: generated.
        :param target: State of the forks: Running, Standby or Stopped.
        :param vmm: VMM of the forks. Default: the source's. Another VMM cannot use the source's
            memory: the source or the target must be Stopped.
        :param tags: Tags of the new records.
        :param publish: Ports of this host to forward to each fork. Several forks need the address
            `own` or the port 0; each fork's record has its actual ports.
        :param egress: Egress policy of each fork, on a network that enforces it. Default: its
            source's.
        :param limits: Limits of the VMM of each fork, which replace all limits of its source.
            Default: its source's.
        :param measure: Also report each fork's memory, as `stats` does later.
        :param payload: At most 1 MiB, written to /run/coppice/payload in each fork before the
            image's /etc/coppice/on-fork runs. It is stored nowhere else.
        :param notify: Address of a process that is warm in the source and is to know of each fork:
            a port of the guest's own loopback, or `unix:` and the path of a socket. Each fork of
            captured memory sends it one HTTP request, `POST /coppice/fork` with the payload as its
            body, and is Running only after an answer of 2xx. `none`: no request. Default: none; a
            fork: its source's.
        :param ttl_s: Seconds from now after which the instance expires; 0: never. Default:
            unchanged.
        :param expires_at: Time at which the instance expires, in seconds since the epoch; instead
            of a TTL.
        :param on_expiry: What happens then: `remove`, `standby` or `stop`. Default: unchanged, or
            remove.
        :param restart: When a machine that ended by itself is started again. Default: never; a
            fork: its source's.
        :param health_check: How to find out whether its service works. Default: no check; a fork:
            its source's.
        :param auto_standby_s: Put the machine into standby after so many seconds without a session,
            a running command or a connection to a published TCP port, and wake it at the next
            connection; 0: never. Default: never; a fork: its source's.
        :param from_running: Fork a Running instance. It is paused, and then continues; the report
            has the time.
        :param volume_policy: What happens to volumes that the source writes to. `refuse`: such a
            source is not forked. `clone`: each fork gets a copy-on-write clone of its own, which is
            removed with the fork.
        :param progress: Called with each step of the work.
        :raises IllegalTransition: the source's state does not allow a fork
        :raises InUse: the source writes to a volume, and the policy is `refuse`
        :raises NoSpace: the forks exceed a budget; none was made
        """
        return self._machine(
            self._portal.call(
                self._twin.fork_one(
                    name=name,
                    target=target,
                    vmm=vmm,
                    tags=tags,
                    publish=publish,
                    egress=egress,
                    limits=limits,
                    measure=measure,
                    payload=payload,
                    notify=notify,
                    ttl_s=ttl_s,
                    expires_at=expires_at,
                    on_expiry=on_expiry,
                    restart=restart,
                    health_check=health_check,
                    auto_standby_s=auto_standby_s,
                    from_running=from_running,
                    volume_policy=volume_policy,
                    progress=progress,
                )
            )
        )

    def start_ahead(self, count: int = 1) -> int:
        """Start VMMs ahead for the next forks of a template. Return how many VMMs wait.

        They are kept for half a minute. Each has loaded the template's state, but its guest has not
        run. A fork that takes such a VMM is ready sooner, and equal to any other fork. A fork that
        publishes ports does not take one.

        :param count: How many VMMs to keep waiting.
        :raises NoSpace: the forks exceed a budget; VMMs that were started before the failure wait
        :raises NotSupported: the instance is not a template, has volumes, or its VMM does not
            support this
        """
        return self._portal.call(self._twin.start_ahead(count))

    def snapshot(
        self, *, name: str | None = None, kind: SnapshotKind | None = None, tags: Mapping[str, str] | None = None
    ) -> Snapshot:
        """Save the current state of an instance as a snapshot, which never changes and outlives the
        instance.

        A Running instance is paused for `pause_ms`, and then continues. If the snapshot fails,
        nothing is left behind.

        :param name: Name of the snapshot. Default: generated.
        :param kind: Standby: memory and disk. Stopped: only the disk. Default: Stopped for a
            Stopped instance, else Standby.
        :param tags: Tags of the new records.
        :raises NameTaken: another snapshot has the name
        :raises IllegalTransition: the instance has no memory for a Standby snapshot, or is changing
            its state
        """
        return self._portal.call(self._twin.snapshot(name=name, kind=kind, tags=tags))
