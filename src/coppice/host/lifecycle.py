"""Use cases that change an instance: run, start, stop, standby, restore, promote, update."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from coppice.addresses import NOBODY, told
from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError, Expired, IllegalTransition, NotFound
from coppice.host import ports, settling
from coppice.host.activity import idle_s
from coppice.host.admission import demand_of_activation, demand_of_capture, demand_of_run
from coppice.host.volumes import Volumes
from coppice.images.reference import names_registry
from coppice.linux.files import untranslated
from coppice.machine import activate, capture, destroy, limits
from coppice.machine import directory as directories
from coppice.model import (
    CaptureReport,
    Egress,
    EgressReport,
    Image,
    ImageConfig,
    Instance,
    Limits,
    MachineSpec,
    ProcessSpec,
    Progress,
    ProgressSink,
    State,
    Supervision,
)
from coppice.model.inspection import StandbyReport
from coppice.model.kernel import Kernel
from coppice.model.lifecycle import Operation
from coppice.model.supervision import Ending
from coppice.names import new_id, new_name
from coppice.requests import (
    DemoteRequest,
    EgressRequest,
    ImagePullRequest,
    PromoteRequest,
    RestoreRequest,
    RunRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
    UpdateRequest,
)
from coppice.requests.supervision import with_expiry, with_policies
from coppice.state import locks
from coppice.state.journal import JournalOperation
from coppice.timing import Stages
from coppice.trust import certificate_environment, certificates_in, proxy_environment
from coppice.volumes import directory as volume_disks


class Lifecycle(Volumes):
    """The operations that make an instance, and change its state."""

    async def run(self, request: RunRequest, progress: ProgressSink) -> Instance:
        """Record the instance, make its directory, and boot it."""
        found = await self._image_to_run(request, progress)
        name = request.name or new_name(_stem(found.name))
        networks, driver = self.rooms.networks, self.rooms.drivers.wanted(request.vmm)
        machine = MachineSpec(
            cpus=request.cpus,
            memory_bytes=request.memory_bytes,
            overlay_bytes=request.overlay_bytes,
            network=await in_thread(networks.choose, request.network, driver.capabilities.nic_backends),
        )
        networks.check(machine, request.publish, request.egress)
        if request.limits is not None and request.start:
            await in_thread(limits.check, request.limits, self.rooms.layout.home)
        disks = await self._disks(request.volumes)
        clone_bytes = await in_thread(volume_disks.bytes_of_place, self.rooms, disks, driver)
        admit = await self._admit(partial(demand_of_run, driver, machine, start=request.start, clone_bytes=clone_bytes))
        kernel = await self._kernel(request.kernel, progress)
        config = found.config
        certificates = certificates_in((*config.certificates, *request.certificates))
        now = time.time()
        instance = Instance(
            id=new_id(),
            name=name,
            state=State.CREATED,
            created_at=now,
            driver=driver.name,
            image=found.digest,
            image_name=found.name,
            machine=msgspec.structs.replace(machine, kernel=kernel.key, acpi=kernel.acpi, volumes=disks),
            process=ProcessSpec(
                argv=_argv(config, request.entrypoint, request.command),
                env={
                    **certificate_environment(certificates),
                    **config.env,
                    **proxy_environment(request.proxy),
                    **request.env,
                },
                workdir=request.workdir or config.workdir,
                user=request.user if request.user is not None else config.user,
                certificates=certificates,
                notify=None if request.notify == NOBODY else request.notify,
            ),
            hostname=request.hostname or name,
            tags=dict(request.tags),
            publish=tuple(request.publish),
            egress=request.egress or Egress(),
            limits=request.limits or Limits(),
            vmm_bytes=driver.vmm_bytes(machine),
            owner=self.owner,
            supervision=with_policies(None, request, now),
        )

        def check() -> None:
            admit()
            self.rooms.kernels.get(kernel.key)  # another process may have removed it

        with untranslated(f"run {instance.name}"):
            return await self._make(instance, check, start=request.start, progress=progress)

    async def _image_to_run(self, request: RunRequest, progress: ProgressSink) -> Image:
        """Return the image, and pull it if the request says so."""
        if request.pull != "always":
            try:
                return await in_thread(self.rooms.images.get, request.image, self._usable)
            except NotFound:
                # A name without a registry is more likely a mistyped name of a local image.
                if request.pull == "never" or not names_registry(request.image):
                    raise
        return await self._pull(ImagePullRequest(reference=request.image), progress)

    async def _make(
        self, instance: Instance, check: Callable[[], None], *, start: bool, progress: ProgressSink
    ) -> Instance:
        try:
            # Record first: gc removes a lock file that has no record.
            (instance,) = await in_thread(self.rooms.store.create, [instance], JournalOperation.RUN, check)
            async with locks.hold(self.rooms.layout.lock(instance.id), what=instance.name):
                # Another process may have removed the instance before this one locked it.
                await in_thread(self.rooms.store.require, instance)
                await in_thread(self._place_new, instance)
                instance = await volume_disks.place(self.rooms, instance)
                if start:
                    if instance.machine.volumes:
                        instance = await activate.own_disks(self.rooms, instance)
                    progress(Progress(stage="boot"))
                    return await activate.boot(self.rooms, instance, Stages())
                stopped = msgspec.structs.replace(instance, state=State.STOPPED)
                await in_thread(self.rooms.store.save, stopped, done=True)
                return stopped
        except BaseException:
            await complete(destroy.destroy(self.rooms, instance))
            raise

    async def _kernel(self, key: str | None, progress: ProgressSink) -> Kernel:
        if key is not None:
            return await in_thread(self.rooms.kernels.get, key)
        return await self.rooms.kernels.ensure_debian(progress)

    def _place_new(self, instance: Instance) -> None:
        directory = self.rooms.directory(instance.id)
        directories.create(directory)
        image = self.rooms.images.get(instance.image)
        directories.place_root(directory, self.rooms.images.root_file(image))
        directories.place_overlay(directory, self.rooms.overlays, instance.machine.overlay_bytes)

    async def start(self, request: StartRequest, progress: ProgressSink) -> Instance:
        """Boot the instance unless it is running."""
        async with self._hold(request.instance, Operation.START) as (instance, target):
            instance = await self._supervised(instance, with_expiry(instance.supervision, request, time.time()))
            other = request.command is not None or request.entrypoint is not None
            if instance.state is target:
                if other:
                    raise IllegalTransition(
                        f"{instance.name} is {instance.state} with its present command",
                        hint=f"run `coppice stop {instance.name}` first",
                    )
                return await self._run_on(instance)
            if other:
                argv = await self._other_argv(instance, request)
                process = msgspec.structs.replace(instance.process, argv=argv)
                instance = msgspec.structs.replace(instance, process=process)
            progress(Progress(stage="boot"))
            return await self._activate(instance, JournalOperation.START, boot=True)

    async def _other_argv(self, instance: Instance, request: StartRequest) -> tuple[str, ...]:
        """Return the words of the command that a machine is to be started with."""
        config = ImageConfig()
        if request.entrypoint is None:
            config = (await in_thread(self.rooms.images.get, instance.image, self._usable)).config
        return _argv(config, request.entrypoint, request.command or ())

    async def restore(self, request: RestoreRequest) -> Instance:
        """Load the captured memory unless the instance is running."""
        async with self._hold(request.instance, Operation.RESTORE) as (instance, target):
            if instance.state is target:
                return await self._run_on(instance)
            return await self._activate(instance, JournalOperation.RESTORE, boot=False)

    async def _run_on(self, instance: Instance) -> Instance:
        directory = self.rooms.directory(instance.id)
        driver = self.rooms.driver(instance)
        if await driver.is_paused(directory):  # no capture has paused it: this process holds the lock
            await driver.resume(directory)
        return instance

    async def _activate(self, instance: Instance, operation: JournalOperation, *, boot: bool) -> Instance:
        admit = await self._admit(partial(demand_of_activation, self.rooms, instance, boot=boot))
        try:
            await in_thread(self.rooms.store.begin, instance, operation, admit)
            instance = await activate.own_disks(self.rooms, instance)
            if idle_s(instance):
                await ports.release(self.rooms.layout.home, instance)
            return await (activate.boot if boot else activate.restore)(self.rooms, instance, Stages())
        except BaseException as error:
            await complete(settling.settle(self.rooms, instance, f"{operation} failed: {error}"))
            raise

    async def stop(self, request: StopRequest) -> Instance:
        """Ask the guest to power off; end its VMM if it does not."""
        async with self._hold(request.instance, Operation.STOP) as (instance, target):
            if instance.state is not target:
                return await self._stop(instance, request.grace_s)
            if instance.ending == "failed" or instance.ending == "clean":  # it is not to be started again
                instance = msgspec.structs.replace(instance, ending="asked")
                await in_thread(self.rooms.store.save, instance)
            return instance

    async def _stop(
        self, instance: Instance, grace_s: float | None, why: str | None = None, ending: Ending = "asked"
    ) -> Instance:
        """Stop an instance whose lock is held. Without `why` the record says how it stopped."""
        grace = self.rooms.deadlines.stop if grace_s is None else grace_s
        stopping = msgspec.structs.replace(instance, state=State.SHUTDOWN)
        reason = "stopped hard"
        try:
            await in_thread(self.rooms.store.begin, stopping, JournalOperation.STOP)
        except asyncio.CancelledError:
            await complete(self._stopped(stopping, why or reason, ending))
            raise  # after any other error nothing was recorded, and the guest keeps running
        try:
            if grace and instance.state is State.RUNNING and await self._power_off(instance, grace):
                reason = "powered off"
        finally:
            settled = await complete(self._stopped(stopping, why or reason, ending))
        return settled

    async def _stopped(self, instance: Instance, reason: str, ending: Ending) -> Instance:
        await in_thread(directories.clear_capture, self.rooms.directory(instance.id))
        return await settling.settle(self.rooms, instance, reason, ending)

    async def _power_off(self, instance: Instance, grace_s: float) -> bool:
        """Ask the guest to power off. Return whether it did so in time."""
        if instance.vmm is None:
            return False
        try:
            async with asyncio.timeout(grace_s):
                async with self.rooms.ports(instance).control(grace_s) as control:
                    await control.poweroff(grace_s / 2)
                await self.rooms.driver(instance).wait_exit(self.rooms.directory(instance.id), instance.vmm)
        except (CoppiceError, TimeoutError):
            return not self.rooms.driver(instance).alive(instance.vmm)
        return True

    async def standby(self, request: StandbyRequest) -> StandbyReport:
        """Capture the instance and end its VMM, unless it is Standby already."""
        async with self._hold(request.instance, Operation.STANDBY) as (instance, target):
            if instance.state is target:
                nothing = CaptureReport(pause_ms=0, total_ms=0, ram_bytes_written=0, dirty_bytes=0)
                return StandbyReport(instance=instance, capture=nothing)
            return await self._capture(instance)

    async def _capture(self, instance: Instance) -> StandbyReport:
        await self._admit(partial(demand_of_capture, self.rooms, instance))
        captured, report = await capture.standby(self.rooms, instance)
        self._hash().captured(captured)
        return StandbyReport(instance=captured, capture=report)

    async def promote(self, request: PromoteRequest) -> Instance:
        """Record the instance as a Template, public or not."""
        return await self._change(request.instance, Operation.PROMOTE, request.public, request.notify)

    async def demote(self, request: DemoteRequest) -> Instance:
        """Record the instance as Standby, and remove the VMMs that were started ahead for it."""
        demoted = await self._change(request.instance, Operation.DEMOTE)
        await self._spare().drop(demoted.id)
        return demoted

    async def egress(self, request: EgressRequest) -> EgressReport:
        """Record the new policy, then apply it to the network. Without a policy, only report."""
        if request.policy is None:
            instance = await self._current(request.instance)
            return await self.rooms.networks.of(instance.machine).egress(instance)
        async with self._hold(request.instance, Operation.EGRESS) as (instance, _):
            self.rooms.networks.check(instance.machine, (), request.policy)
            instance = msgspec.structs.replace(instance, egress=request.policy)
            await in_thread(self.rooms.store.save, instance)
            provider = self.rooms.networks.of(instance.machine)
            await provider.permit(instance)
            return await provider.egress(instance)

    async def update(self, request: UpdateRequest) -> Instance:
        """Record the new policies. The supervisor reads them from the record."""
        async with self._hold(request.instance, Operation.UPDATE) as (instance, _):
            if instance.expires_at is not None and instance.expires_at <= time.time():
                raise Expired(f"the lifetime of {instance.name} is over", hint="make another instance")
            return await self._supervised(instance, with_policies(instance.supervision, request, time.time()))

    async def _supervised(self, instance: Instance, policies: Supervision | None) -> Instance:
        """Record policies if they have changed."""
        if policies == instance.supervision:
            return instance
        changed = msgspec.structs.replace(instance, supervision=policies)
        await in_thread(self.rooms.store.save, changed)
        return changed

    async def _change(
        self, key: str, operation: Operation, public: bool | None = None, notify: int | str | None = None
    ) -> Instance:
        async with self._hold(key, operation) as (instance, target):
            process = told(instance.process, notify)
            if instance.state is target and public in (None, instance.public) and process == instance.process:
                return instance
            instance = msgspec.structs.replace(instance, process=process)
            if operation is Operation.PROMOTE:
                instance = await self._merged(instance)
            public = instance.public if public is None else public  # one that is no template is not public
            changed = await in_thread(self.rooms.store.promote, instance, target, public=public)
            self._hash().captured(changed)
            return changed


def _stem(image_name: str) -> str:
    """Return the part of an image's name that instance names can start with."""
    last = image_name.rpartition("/")[2].partition(":")[0]
    return "".join(char if char.isalnum() else "-" for char in last.lower()).strip("-") or "vm"


def _argv(config: ImageConfig, entrypoint: Sequence[str] | None, command: Sequence[str]) -> tuple[str, ...]:
    """Return the words of an instance's process. As in OCI runtimes, an entrypoint that is given
    also replaces the image's command.
    """
    if entrypoint is not None:
        return (*entrypoint, *command)
    return (*config.entrypoint, *(command or config.cmd))
