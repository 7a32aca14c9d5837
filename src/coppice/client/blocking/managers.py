# Written by tools/generate_client.py from client/aio: change that, then run it.

"""Managers of volumes and snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from coppice.client.aio.managers import AsyncSnapshots, AsyncVolumes
from coppice.client.blocking.twin import Twin
from coppice.model import (
    Egress,
    HealthCheck,
    Limits,
    ProgressSink,
    Publish,
    RestartPolicy,
    Snapshot,
    State,
    Volume,
    no_progress,
)
from coppice.model.inspection import SnapshotInspection, VolumeInspection

if TYPE_CHECKING:
    from coppice.client.blocking.forks import Forks
    from coppice.client.blocking.machine import Machine


class Volumes(Twin[AsyncVolumes]):
    """The volumes of a host: disks that outlive machines."""

    def create(
        self,
        name: str,
        *,
        size_bytes: int = 1 << 30,
        archive: Path | str | None = None,
        tags: Mapping[str, str] | None = None,
        progress: ProgressSink = no_progress,
    ) -> Volume:
        """Make a volume: a disk with an ext4 file system, allocated as it is filled. `run` attaches
        it.

        :param name: Name of the volume.
        :param size_bytes: Size of the disk, in whole MiB.
        :param archive: A tar archive of this machine with the volume's first content, plain or
            compressed by gzip, zstd, xz or bzip2. Owners, modes, times, links and extended
            attributes are kept; devices are refused.
        :param tags: Tags of the new records.
        :param progress: Called with each step of the work.
        :raises NameTaken: another volume has the name
        :raises ImageError: the archive is corrupt, truncated or unsafe, or contains a device node
        :raises UsageError: there is no such archive, or its content does not fit
        :raises NoSpace: the disk is full
        """
        return self._portal.call(
            self._twin.create(name, size_bytes=size_bytes, archive=archive, tags=tags, progress=progress)
        )

    def ls(self, *, tags: Mapping[str, str] | None = None) -> list[Volume]:
        """Return the owner's volumes, oldest first, with the instances and snapshots that hold them.

        The operator sees all.

        :param tags: Return only records that have all of these tags.
        """
        return self._portal.call(self._twin.ls(tags=tags))

    def inspect(self, volume: Volume | str) -> VolumeInspection:
        """Return one volume with its holders and its allocated size.

        :param volume: Name or id of the volume.
        :raises NotFound: there is no such volume
        """
        return self._portal.call(self._twin.inspect(volume))

    def rm(self, volume: Volume | str) -> None:
        """Remove a volume and everything on it.

        :param volume: Name or id of the volume.
        :raises NotFound: there is no such volume
        :raises InUse: instances or snapshots hold the volume; the message names them
        """
        self._portal.call(self._twin.rm(volume))


class Snapshots(Twin[AsyncSnapshots]):
    """The snapshots of a host. `vm.snapshot` makes one."""

    def ls(self, *, source: str | None = None, tags: Mapping[str, str] | None = None) -> list[Snapshot]:
        """Return the owner's snapshots, oldest first.

        :param source: Return only snapshots of this instance, which may be removed: name or id.
        :param tags: Return only records that have all of these tags.
        """
        return self._portal.call(self._twin.ls(source=source, tags=tags))

    def inspect(self, snapshot: Snapshot | str) -> SnapshotInspection:
        """Return one snapshot with its sizes, its links and its forks.

        :param snapshot: Name or id of the snapshot.
        :raises NotFound: there is no such snapshot
        """
        return self._portal.call(self._twin.inspect(snapshot))

    def restore(self, snapshot: Snapshot | str, *, start: bool = False) -> Machine:
        """Reset an instance to its snapshot. Its current memory and disk are lost; a Running one is
        ended.

        The instance is Standby afterwards, or Stopped if the snapshot has no memory. To keep the
        current state, fork the snapshot instead.

        :param snapshot: Name or id of the snapshot.
        :param start: Start the instance afterwards.
        :raises NotFound: there is no such snapshot, or its instance was removed
        :raises IllegalTransition: the instance is a template
        :raises IntegrityError: the snapshot's memory differs from the captured memory
        """
        return self._machine(self._portal.call(self._twin.restore(snapshot, start=start)))

    def rm(self, snapshot: Snapshot | str) -> None:
        """Remove a snapshot. Its instance and its forks keep their memory and disks.

        :param snapshot: Name or id of the snapshot.
        :raises NotFound: there is no such snapshot
        """
        self._portal.call(self._twin.rm(snapshot))

    def fork(
        self,
        snapshot: Snapshot | str,
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
        progress: ProgressSink = no_progress,
    ) -> Forks:
        """Grow forks from a snapshot, as `fork` does from an instance.

        The parent of the forks is the snapshot's instance, if it still exists.

        :param snapshot: Name or id of the snapshot.
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
        :param progress: Called with each step of the work.
        :raises NotFound: there is no such snapshot
        :raises IllegalTransition: the target is Standby and the snapshot has no memory
        :raises NoSpace: the forks exceed a budget; none was made
        """
        return self._forks(
            self._portal.call(
                self._twin.fork(
                    snapshot,
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
                    progress=progress,
                )
            )
        )

    def fork_one(
        self,
        snapshot: Snapshot | str,
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
        progress: ProgressSink = no_progress,
    ) -> Machine:
        """Grow one fork, and return its machine. Raise the fork's error if it fails.

        Parameters and errors are those of `fork`.

        :param snapshot: Name or id of the snapshot.
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
        :param progress: Called with each step of the work.
        :raises NotFound: there is no such snapshot
        :raises IllegalTransition: the target is Standby and the snapshot has no memory
        :raises NoSpace: the forks exceed a budget; none was made
        """
        return self._machine(
            self._portal.call(
                self._twin.fork_one(
                    snapshot,
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
                    progress=progress,
                )
            )
        )
