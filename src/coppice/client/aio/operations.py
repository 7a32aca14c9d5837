# Written by tools/generate_client.py: change coppice.requests, then run it.

"""Operations of a host, except those of its managers and machines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from coppice.client.aio.base import Bound, text_of
from coppice.client.backend import Backend, Opening
from coppice.model import (
    Budgets,
    BudgetUse,
    Check,
    Egress,
    GcReport,
    HealthCheck,
    Limits,
    MemoryReport,
    ProgressSink,
    Publish,
    RestartPolicy,
    State,
    TreeNode,
    VerifyReport,
    VolumeMount,
    no_progress,
)
from coppice.model.events import Event
from coppice.requests import (
    BudgetRequest,
    DoctorRequest,
    EventsRequest,
    GcRequest,
    GetRequest,
    ImportTemplateRequest,
    LsRequest,
    RunRequest,
    StatsRequest,
    TreeRequest,
    UnloadableRequest,
    VerifyRequest,
)

if TYPE_CHECKING:
    from coppice.client.aio.machine import AsyncMachine
    from coppice.host.opened import Background, RoomsOpener
    from coppice.machine.rooms import Deadlines
    from coppice.vmm.driver import VmmDriver


class HostOperations(Bound):
    """Operations that make and find machines, or concern all of them."""

    def __init__(
        self,
        home: Path | str | None = None,
        *,
        vmm: str | None = None,
        accel: str = "auto",
        owner: str | None = None,
        driver: VmmDriver | None = None,
        deadlines: Deadlines | None = None,
        budgets: Budgets | None = None,
        background: Background = "owned",
        spares: int | None = None,
        open_rooms: RoomsOpener | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Prepare to use the data directory `home` (default: that of the command line).

        `owner` limits the host to one owner: it makes, sees and uses only that owner's records.
        Without an owner the host belongs to the operator, who may use everything (see
        `coppice.model.ownership`).
        `vmm` names the driver of new machines (default: `qemu`). Existing machines keep the driver
        that their records name. `accel` is `auto`, `kvm` or `tcg`.
        `driver` replaces the registered driver of the same name, and is used for new machines.
        `open_rooms` replaces the stores and drivers of the data directory.
        `budgets` replace the budgets from config.toml and the environment (see
        `coppice.state.budgets`).
        `background` says what happens to the hashing of captures when the host is closed. `owned`:
        it ends, and the next host continues it. `detached`: it continues by itself. `off`: captures
        are not hashed. config.toml and the environment can also switch it off (see
        `coppice.state.settings`).
        `spares` is the number of VMMs that are started ahead for each template. Default: as many as
        forks of it were requested within one second lately, at most 16 (a fan-out counts in full when one
        of its size was requested twice). The host starts them after it has
        forked the template twice within half a minute, and ends them when it is closed (see
        `coppice.fork.spare`). Each takes about 20 MiB. 0: none.

        `backend` carries out the requests instead of this machine.

        :raises InvalidName: the owner is not a valid name
        :raises UsageError: there is no such VMM or accelerator, the number of spares is out of range, the
            path of the data directory is not UTF-8, or a value has another type
        """
        if backend is None:
            from coppice.host import LocalBackend

            backend = LocalBackend(
                home,
                vmm=vmm,
                accel=accel,
                owner=owner,
                driver=driver,
                deadlines=deadlines,
                budgets=budgets,
                background=background,
                spares=spares,
                open_rooms=open_rooms,
            )
        super().__init__(backend)

    def run(
        self,
        image: str,
        command: Sequence[str] = (),
        *,
        entrypoint: Sequence[str] | None = None,
        name: str | None = None,
        cpus: int = 1,
        memory_bytes: int = 512 << 20,
        overlay_bytes: int = 2 << 30,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        hostname: str | None = None,
        tags: Mapping[str, str] | None = None,
        publish: Sequence[Publish] = (),
        network: str | None = None,
        egress: Egress | None = None,
        limits: Limits | None = None,
        vmm: str | None = None,
        volumes: Sequence[VolumeMount] = (),
        certificates: Sequence[str] = (),
        proxy: str | None = None,
        kernel: str | None = None,
        start: bool = True,
        pull: Literal["missing", "always", "never"] = "missing",
        notify: int | str | None = None,
        ttl_s: float | None = None,
        expires_at: float | None = None,
        on_expiry: Literal["remove", "standby", "stop"] | None = None,
        restart: RestartPolicy | None = None,
        health_check: HealthCheck | None = None,
        auto_standby_s: float | None = None,
        progress: ProgressSink = no_progress,
    ) -> Opening[AsyncMachine]:
        """Make an instance of an image and boot it. Return when its agent has answered.

        If it fails, nothing is left behind.

        :param image: Name, digest or unique prefix of the digest of an image.
        :param command: Replaces the image's command; its entrypoint stays, as in OCI runtimes.
        :param entrypoint: Replaces the image's entrypoint and its command. Default: the image's.
        :param name: Name of the instance. Default: generated.
        :param cpus: Virtual CPUs.
        :param memory_bytes: RAM, in whole MiB.
        :param overlay_bytes: Size of its own writable disk, in whole MiB.
        :param env: Variables of its process, added to the image's.
        :param workdir: Working directory of its process, an absolute path. Default: the image's.
        :param user: User of its process: a name, UID, or UID:GID. Default: the image's.
        :param hostname: Host name in the guest. Default: the instance's name.
        :param tags: Tags of the new records.
        :param publish: Ports of this host to forward to the guest.
        :param network: `nat` for its own subnet with an egress policy, `user`, `passt`, or `none`
            for no NIC. Default: `nat` if the host can provide it, else `user` if the VMM can attach
            it.
        :param egress: Egress policy of the guest, on a network that enforces it. Default: all.
        :param limits: Limits of its VMM, enforced by a control group, which the host must permit.
            Default: none.
        :param vmm: Name of its VMM: `qemu` or `firecracker`. Default: the host's.
        :param volumes: Volumes to mount before its process starts. They stay attached until it is
            removed.
        :param certificates: PEM texts of authorities to trust, besides those of the image, such as
            a company's.
        :param proxy: URL of an HTTP proxy. All processes of the guest get it as http_proxy,
            https_proxy and their like.
        :param kernel: Key of an added kernel. Default: Debian's, fetched at first use.
        :param start: False: do not boot the instance; it is Stopped.
        :param pull: When to pull the image. `missing`: if it is missing and its name begins with a
            registry, as in `docker.io/library/alpine`.
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
        :raises NotFound: there is no such image, volume or kernel
        :raises NameTaken: the name is in use
        :raises InUse: a volume is attached to another instance and one of the two writes to it, or
            another program uses a port to publish
        :raises NoSpace: a budget is exceeded, or the disk is full
        :raises VmmDied: the machine ended before its agent answered
        :raises GuestTimeout: the agent did not answer in time
        """
        return self._made(
            RunRequest(
                image=image,
                command=command,
                entrypoint=entrypoint,
                name=name,
                cpus=cpus,
                memory_bytes=memory_bytes,
                overlay_bytes=overlay_bytes,
                env={} if env is None else env,
                workdir=workdir,
                user=user,
                hostname=hostname,
                tags={} if tags is None else tags,
                publish=publish,
                network=network,
                egress=egress,
                limits=limits,
                vmm=vmm,
                volumes=volumes,
                certificates=certificates,
                proxy=proxy,
                kernel=kernel,
                start=start,
                pull=pull,
                notify=notify,
                ttl_s=ttl_s,
                expires_at=expires_at,
                on_expiry=on_expiry,
                restart=restart,
                health_check=health_check,
                auto_standby_s=auto_standby_s,
            ),
            progress,
        )

    async def import_template(
        self, path: Path | str, *, name: str | None = None, progress: ProgressSink = no_progress
    ) -> AsyncMachine:
        """Make a template of an archive that `export` wrote, on this host or another one.

        Every file is compared with its digest before the template exists. The image and the kernel
        are kept too, unless they are here already. If it fails, no template is left behind.

        :param path: A path on this machine.
        :param name: Name of the template. Default: its name in the archive.
        :param progress: Called with each step of the work.
        :raises ImageError: the archive is truncated, corrupt or not an archive of a template
        :raises HostCannot: this host cannot load the template's memory; the message says why
        :raises NameTaken: the name is in use
        :raises NoSpace: a budget is exceeded, or the disk is full
        """
        return await self._machine_of(ImportTemplateRequest(name=name, path=text_of(path)), progress)

    async def get(self, instance: str) -> AsyncMachine:
        """Return the instance in its true state, which includes a check whether its VMM still runs.

        :param instance: Name or id of the instance.
        :raises NotFound: there is no such instance
        """
        return await self._machine_of(GetRequest(instance=instance))

    async def ls(self, *, state: State | None = None, tags: Mapping[str, str] | None = None) -> list[AsyncMachine]:
        """Return the owner's instances, oldest first. The operator sees all.

        An instance whose true state cannot be determined now is Unknown.

        :param state: Return only instances in this state.
        :param tags: Return only records that have all of these tags.
        """
        return await self._machines_of(LsRequest(state=state, tags={} if tags is None else tags))

    async def stats(self, instance: str | None = None) -> dict[str, MemoryReport]:
        """Return the memory of each instance that holds memory, and the traffic of each that is
        Running, by name.

        Where only a guest counts the traffic, it is asked if its instance is the only one that is
        wanted.

        :param instance: Return only this instance: name or id.
        """
        return await self._backend.call(StatsRequest(instance=instance))

    async def tree(self, instance: str | None = None) -> list[TreeNode]:
        """Return the lineage in the order of a drawn tree: each instance is followed by its forks.

        An instance whose parent was removed is a root.

        :param instance: Return only this instance and its forks: name or id.
        """
        return await self._backend.call(TreeRequest(instance=instance))

    async def unloadable(self, holders: Sequence[str] | None = None) -> dict[str, str]:
        """Return the captures that can no longer be loaded here: the reason by instance or snapshot
        id.

        Either the VMM was updated after the capture, or this host is of another kind.

        :param holders: Check only these instances and snapshots, by id. Default: all.
        """
        return await self._backend.call(UnloadableRequest(holders=holders))

    async def budget(self) -> BudgetUse:
        """Return the budgets of the data directory, and how much of them all owners use."""
        return await self._backend.call(BudgetRequest())

    async def verify(self, *, progress: ProgressSink = no_progress) -> VerifyReport:
        """Check that captured mem-files and disks at rest, volumes included, are unchanged. Report
        differences.

        Compare inode, size, mode and SHA-256, and run e2fsck on disks that no machine uses. A
        SHA-256 that was not computed yet is recorded for the next check. Files are neither changed
        nor repaired.

        :param progress: Called with each step of the work.
        :raises MissingTool: e2fsck is not installed
        :raises Refused: the host has an owner; only the operator may read the files of all owners
        """
        return await self._backend.call(VerifyRequest(), progress)

    async def gc(self, *, dry_run: bool = False, caches: bool = False) -> GcReport:
        """Remove leftovers of killed processes: directories, lock files and VMMs without a record, and
        temporary files of builds and checks.

        Nothing that is in use, or may soon be in use, is removed.

        :param dry_run: Only report what would be removed.
        :param caches: Also remove unused content that can be made or fetched again: fetched
            kernels, boot files, empty disks, images without a name.
        :raises Refused: the host has an owner; only the operator may remove leftovers
        :raises Busy: operations are under way that may need a cache
        """
        return await self._backend.call(GcRequest(dry_run=dry_run, caches=caches))

    async def events(self, *, after: int | None = None, follow: bool = False) -> AsyncIterator[Event]:
        """Yield what happened to the owner's instances: made, changed state, removed. The operator
        sees all.

        The newest 20,000 events are kept. If the next event is no longer kept, the first one
        yielded is `lost`: list the instances again.

        :param after: Begin after the event with this id. Default: all; if following, only new ones.
        :param follow: Wait for new events.
        """
        async with self._backend.stream(EventsRequest(after=after, follow=follow)) as items:
            async for item in items:
                yield item

    async def doctor(self) -> list[Check]:
        """Check this host. Return one result per check, with a command that fixes it. The host need
        not be open.
        """
        return await self._backend.call(DoctorRequest())
