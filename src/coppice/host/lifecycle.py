"""Use cases that change what an instance is: run, start, stop, standby, restore, promote, demote, fork, remove."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from coppice.completion import all_of, complete, in_thread
from coppice.disk.atomic import os_errors
from coppice.errors import CoppiceError, NoSpace, NotSupported, UsageError
from coppice.fork.fanout import fan_out
from coppice.fork.plan import OPERATION as FORK
from coppice.fork.plan import ForkRequest, make_request
from coppice.fork.spare import serves
from coppice.host.admission import (
    demand_of_activation,
    demand_of_capture,
    demand_of_forks,
    demand_of_run,
)
from coppice.host.base import Reference
from coppice.host.spares import check_spares
from coppice.host.volumes import Volumes
from coppice.instance import activate, capture, destroy, live, recovery
from coppice.instance import directory as directories
from coppice.instance import volume as volume_disks
from coppice.lifecycle import Operation
from coppice.model import (
    GIB,
    MIB,
    CaptureReport,
    ForkReport,
    Instance,
    MachineSpec,
    ProcessSpec,
    Progress,
    ProgressSink,
    Publish,
    State,
    VolumeMount,
    no_progress,
)
from coppice.names import (
    MAX_SECONDS,
    check_argv,
    check_env,
    check_machine,
    check_name,
    check_publish,
    check_recorded,
    check_tags,
    new_id,
    new_name,
)
from coppice.store import locks
from coppice.timing import Stages


class Lifecycle(Volumes):
    """The life of an instance."""

    async def run(
        self,
        image: str,
        command: Sequence[str] = (),
        *,
        name: str | None = None,
        cpus: int = 1,
        memory_bytes: int = 512 * MIB,
        overlay_bytes: int = 2 * GIB,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        hostname: str | None = None,
        tags: Mapping[str, str] | None = None,
        publish: Sequence[Publish] = (),
        volumes: Sequence[VolumeMount] = (),
        kernel: str | None = None,
        start: bool = True,
        progress: ProgressSink = no_progress,
    ) -> Instance:
        """Make an instance of an image and boot it. Returns when its agent has answered, or, with `start=False`, when it is Stopped.

        `command` replaces the image's command (its entrypoint stays), as OCI runtimes have it. `kernel` is the key of a kernel that was added;
        by default Debian's cloud kernel, fetched at the first use. `volumes` are mounted before the process starts, and stay attached as long as
        the instance is there, in whatever state. Nothing is left behind if it fails.

        :raises NotFound: there is no such image, volume or kernel
        :raises NameTaken: the name is in use
        :raises InUse: another instance has a volume, and one of the two is to write to it; or another program has a port that is to be published
        :raises NoSpace: a budget is spent, or the disk is full
        :raises VmmDied: the machine ended before it answered
        :raises GuestTimeout: it did not answer in time
        """
        check_machine(cpus, memory_bytes, overlay_bytes)
        found = await in_thread(self.rooms.images.get, image, self._usable)
        chosen_name = check_name(name) if name is not None else new_name(_stem(found.name))
        environment = check_env(env or {})
        words = check_argv(command)
        check_recorded(*words, *environment.values(), workdir or "", user or "")
        disks = await self._disks(volumes)
        admit = await self._admit(demand_of_run(memory_bytes, start=start))
        chosen_kernel = await self._kernel(kernel, progress)
        config = found.config
        argv = (*config.entrypoint, *(words or config.cmd))
        instance = Instance(
            id=new_id(),
            name=chosen_name,
            state=State.CREATED,
            created_at=time.time(),
            driver=self.rooms.driver.name,
            image=found.digest,
            image_name=found.name,
            machine=MachineSpec(
                cpus=cpus, memory_bytes=memory_bytes, overlay_bytes=overlay_bytes, kernel=chosen_kernel, volumes=disks
            ),
            process=ProcessSpec(
                argv=argv,
                env={**config.env, **environment},
                workdir=workdir or config.workdir,
                user=user if user is not None else config.user,
            ),
            hostname=check_name(hostname) if hostname is not None else chosen_name,
            tags=check_tags(tags or {}),
            publish=check_publish(publish),
            owner=self.owner,
        )

        def check() -> None:
            admit()
            self.rooms.kernels.get(chosen_kernel)  # it may have been removed meanwhile

        with os_errors(f"run {instance.name}"):
            return await self._make(instance, check, start=start, progress=progress)

    async def _make(
        self, instance: Instance, check: Callable[[], None], *, start: bool, progress: ProgressSink
    ) -> Instance:
        try:
            # First: a lock file without a record is nobody's.
            (instance,) = await in_thread(self.rooms.store.create, [instance], "run", check)
            async with locks.hold(self.rooms.layout.lock(instance.id), what=instance.name):
                await in_thread(
                    self.rooms.store.get, instance.id
                )  # another process may have removed it before it was held
                await in_thread(self._place_new, instance)
                await volume_disks.place(self.rooms, instance)
                if start:
                    progress(Progress(stage="boot"))
                    return await activate.boot(self.rooms, instance, Stages())
                stopped = msgspec.structs.replace(instance, state=State.STOPPED)
                await in_thread(self.rooms.store.save, stopped, done=True)
                return stopped
        except BaseException:
            await complete(destroy.destroy(self.rooms, instance))
            raise

    async def _kernel(self, key: str | None, progress: ProgressSink) -> str:
        if key is not None:
            return (await in_thread(self.rooms.kernels.get, key)).key
        return (await self.rooms.kernels.ensure_debian(progress)).key

    def _place_new(self, instance: Instance) -> None:
        directory = self.rooms.directory(instance.id)
        directories.create(directory)
        image = self.rooms.images.get(instance.image)
        directories.place_root(directory, self.rooms.images.root_file(image))
        directories.place_overlay(directory, self.rooms.overlays, instance.machine.overlay_bytes)

    async def start(self, reference: Reference, *, progress: ProgressSink = no_progress) -> Instance:
        """Boot a Stopped instance from its disk. A Running one runs on, as `restore` has it.

        :raises VmmDied: the machine ended before it answered; it is Stopped again
        :raises InUse: another program has a port that it publishes
        """
        async with self._hold(reference, Operation.START) as (instance, target):
            if instance.state is target:
                return await self._run_on(instance)
            progress(Progress(stage="boot"))
            return await self._activate(instance, "start", boot=True)

    async def restore(self, reference: Reference) -> Instance:
        """Let a Standby instance run on from its captured memory.

        A Running one runs on, also where its VMM has paused it because the host's disk had no room for what the guest wrote.

        :raises IntegrityError: the capture was tampered with, or was made on another kind of host
        :raises InUse: another program has a port that it publishes; it stays Standby
        """
        async with self._hold(reference, Operation.RESTORE) as (instance, target):
            if instance.state is target:
                return await self._run_on(instance)
            return await self._activate(instance, "restore", boot=False)

    async def _run_on(self, instance: Instance) -> Instance:
        directory = self.rooms.directory(instance.id)
        if await self.rooms.driver.is_paused(directory):  # nobody's capture has paused it: we hold its lock
            await self.rooms.driver.resume(directory)
        return instance

    async def _activate(self, instance: Instance, operation: str, *, boot: bool) -> Instance:
        admit = await self._admit(demand_of_activation(instance, boot=boot))
        try:
            await in_thread(self.rooms.store.begin, instance, operation, admit)
            return await (activate.boot if boot else activate.restore)(self.rooms, instance, Stages())
        except BaseException as error:
            await complete(recovery.settle(self.rooms, instance, f"{operation} failed: {error}"))
            raise

    async def stop(self, reference: Reference, *, grace_s: float | None = None) -> Instance:
        """Power a guest off: gracefully, then, after `grace_s` seconds (default 30; 0: at once), hard. Its memory is gone, its disk stays."""
        grace = self.rooms.deadlines.stop if grace_s is None else grace_s
        if not 0 <= grace <= MAX_SECONDS:
            raise UsageError(f"a grace period cannot be {grace:g} s", hint="use 0 to stop at once")
        async with self._hold(reference, Operation.STOP) as (instance, target):
            if instance.state is target:
                return instance
            stopping = msgspec.structs.replace(instance, state=State.SHUTDOWN)
            reason = "stopped hard"
            try:
                await in_thread(self.rooms.store.begin, stopping, "stop")
            except asyncio.CancelledError:
                await complete(self._stopped(stopping, reason))
                raise  # any other error: it was not begun, and the guest runs on
            try:
                if grace and instance.state is State.RUNNING and await self._power_off(instance, grace):
                    reason = "powered off"
            finally:
                settled = await complete(self._stopped(stopping, reason))
            return settled

    async def _stopped(self, instance: Instance, reason: str) -> Instance:
        await in_thread(directories.clear_capture, self.rooms.directory(instance.id))
        return await recovery.settle(self.rooms, instance, reason)

    async def _power_off(self, instance: Instance, grace_s: float) -> bool:
        """Ask the guest to power off; tell whether it did in time."""
        if instance.vmm is None:
            return False
        try:
            async with asyncio.timeout(grace_s):
                async with self.rooms.ports(instance.id).control(grace_s) as control:
                    await control.poweroff(grace_s / 2)
                await self.rooms.driver.wait_exit(self.rooms.directory(instance.id), instance.vmm)
        except (CoppiceError, TimeoutError):
            return not self.rooms.driver.alive(instance.vmm)
        return True

    async def standby(self, reference: Reference) -> tuple[Instance, CaptureReport]:
        """Capture a Running instance and end its VMM: no process, no RAM, and `restore` lets it run on. A Standby one is left as it is.

        Returns the instance with what the capture cost. If it fails, the guest runs on.
        """
        async with self._hold(reference, Operation.STANDBY) as (instance, target):
            if instance.state is target:
                return instance, CaptureReport(pause_ms=0, total_ms=0, ram_bytes_written=0, dirty_bytes=0)
            await self._admit(demand_of_capture(instance))
            captured, report = await capture.standby(self.rooms, instance)
            self._hash().captured(captured)
            return captured, report

    async def promote(self, reference: Reference, *, public: bool | None = None) -> Instance:
        """Make a Standby instance a Template: fork-only, until it is demoted. A Template stays one.

        With `public` other owners may fork it too, and so share its memory; with False no longer, though forks that there are live on.
        """
        return await self._change(reference, Operation.PROMOTE, public)

    async def demote(self, reference: Reference) -> Instance:
        """Make a Template a Standby instance again.

        :raises InUse: it has forks; the message names them
        """
        demoted = await self._change(reference, Operation.DEMOTE)
        await self._spare().drop(demoted.id)
        return demoted

    async def _change(self, reference: Reference, operation: Operation, public: bool | None = None) -> Instance:
        async with self._hold(reference, operation) as (instance, target):
            if instance.state is target and public in (None, instance.public):
                return instance
            changed = await in_thread(self.rooms.store.promote, instance, target, public=bool(public))
            await in_thread(self.rooms.store.sync)
            self._hash().captured(changed)
            return changed

    async def fork(
        self,
        reference: Reference,
        *,
        count: int = 1,
        names: Sequence[str] = (),
        target: State = State.RUNNING,
        atomic: bool = False,
        tags: Mapping[str, str] | None = None,
        publish: Sequence[Publish] = (),
        from_running: bool = False,
        payload: bytes | None = None,
        payloads: Sequence[bytes] = (),
        progress: ProgressSink = no_progress,
    ) -> ForkReport:
        """Grow `count` forks from a Template, a Standby or a Stopped instance, in parallel. Each has its own result.

        A fork of captured memory shares the source's mem-file by hard link. A failed child is undone and does not touch its siblings;
        with `atomic`, one failure undoes all and is raised. Running means: the fork's agent answered, as itself.
        With `from_running` the source is a Running instance: it is paused for some milliseconds, said in the report, and runs on.
        `payload`, for all, or `payloads`, one for each, is what a fork finds in /run/coppice/payload before the image's /etc/coppice/on-fork
        is run; 1 MiB at most, and kept nowhere else. A hook that fails, or takes longer than 30 s, keeps that fork out of Running.
        Several forks publish ports with the address `own` or the port 0 (see `Publish`); what each was given is in its record.

        :raises IllegalTransition: the source cannot be forked now
        :raises NoSpace: so many do not fit into a budget; none was made
        :raises UsageError: count, names, target or payloads can never be
        """
        request = make_request(
            count=count,
            names=names,
            target=target,
            atomic=atomic,
            tags=tags or {},
            publish=publish,
            from_running=from_running,
            payload=payload,
            payloads=payloads,
        )
        if request.from_running:
            return await self._fork_running(reference, request, progress)
        async with self._hold(reference, Operation.FORK, shared=True) as (source, _):
            with self._spare().taken(source, request) as spares:
                demand = await in_thread(demand_of_forks, self.rooms, source, request, ahead=len(spares))
                admit = await self._admit(demand)
                forked = await fan_out(
                    self.rooms, source, request, progress, owner=self.owner, admit=admit, spares=spares
                )
        self._spare().forked(source, request)
        self._hash().captured(*forked.instances)
        return forked

    async def start_ahead(self, reference: Reference, count: int = 1) -> int:
        """Start VMMs for the next forks of a template before they are asked for; return how many wait. They are kept for half a minute.

        Each has loaded the template's state, and its guest has not run: the fork that gets it is like any other, and ready sooner. A fork that
        publishes ports does not get one.

        :raises UsageError: so many can never be
        :raises NoSpace: there is no room for so many forks; what was started before it was seen waits
        :raises NotSupported: it is no template, or has volumes, or the VMM cannot do it
        """
        check_spares(count)
        async with self._hold(reference, Operation.FORK, shared=True) as (source, _):
            if not serves(self.rooms, source, ForkRequest()):
                raise NotSupported(
                    f"no VMM can be started ahead for {source.name}",
                    hint="it must be a template, without volumes, of a driver that can leave a guest stopped",
                )
            return await self._spare().prepare(source, count)

    async def _fork_running(self, reference: Reference, request: ForkRequest, progress: ProgressSink) -> ForkReport:
        async with self._hold(reference, Operation.FORK_RUNNING) as (source, _):
            # Before the source is paused for nothing.
            await asyncio.to_thread(self.rooms.store.require_free, request.names)
            admit = await self._admit(await in_thread(demand_of_forks, self.rooms, source, request))
            stem = live.new_stem(source)
            try:
                await in_thread(self.rooms.store.create, [stem], FORK, admit)
                captured, report = await live.capture_running(self.rooms, source, stem)
            except BaseException:
                await live.remove_stem(self.rooms, stem)
                raise
        try:
            rest = msgspec.structs.replace(request, from_running=False)
            admit = await self._admit(await in_thread(demand_of_forks, self.rooms, captured, rest))
            forked = await fan_out(self.rooms, captured, rest, progress, owner=self.owner, admit=admit, parent=source)
        except BaseException:
            await live.remove_stem(self.rooms, stem)
            raise
        try:
            await live.remove_stem(self.rooms, stem)
        except asyncio.CancelledError:  # nobody will learn of the forks
            await complete(self._remove_all(forked.instances))
            raise
        self._hash().captured(*forked.instances)
        return msgspec.structs.replace(forked, source_pause_ms=report.pause_ms, capture=report)

    async def rm(self, reference: Reference) -> None:
        """Remove an instance in any state: its VMM, its directory, its record. Forks keep what they share with it, and volumes what is on them.

        :raises InUse: it is a template with forks; the message names them
        """
        async with self._hold(reference, Operation.REMOVE) as (instance, _):
            await complete(self._remove(instance))
        await self._spare().drop(instance.id)

    async def _remove(self, instance: Instance) -> None:
        if any(not disk.readonly for disk in instance.machine.volumes):
            await capture.sync_disk(self.rooms, instance)  # the volume outlives it
        with contextlib.suppress(NoSpace):  # a full disk must not keep anybody from making room
            await in_thread(self.rooms.store.begin, instance, "rm")
        await destroy.destroy(self.rooms, instance)

    @contextlib.asynccontextmanager
    async def machine(
        self, image: str, command: Sequence[str] = (), *, memory_bytes: int = 512 * MIB
    ) -> AsyncIterator[Instance]:
        """An instance for the length of a block: run at its start, removed at its end."""
        instance = await self.run(image, command, memory_bytes=memory_bytes)
        try:
            yield instance
        finally:
            await complete(self.rm(instance))

    @contextlib.asynccontextmanager
    async def forks(self, reference: Reference, count: int) -> AsyncIterator[tuple[Instance, ...]]:
        """Running forks for the length of a block: all of them or an error, removed at its end."""
        report = await self.fork(reference, count=count, atomic=True)
        try:
            yield report.instances
        finally:
            await complete(self._remove_all(report.instances))

    async def _remove_all(self, instances: Sequence[Instance]) -> None:
        await all_of(self.rm(instance) for instance in instances)


def _stem(image_name: str) -> str:
    """The part of an image's name that instance names can start with."""
    last = image_name.rpartition("/")[2].partition(":")[0]
    return "".join(char if char.isalnum() else "-" for char in last.lower()).strip("-") or "vm"
