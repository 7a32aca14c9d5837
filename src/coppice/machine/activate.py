"""Start a machine from its files: start the VMM, give the guest its identity, verify shared memory.

A machine is Running only after its guest has acknowledged its identity. Any failure before that
ends the VMM.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from coppice.agent.control import Acknowledged
from coppice.completion import complete, in_thread, later
from coppice.errors import CoppiceError, GuestTimeout, HostCannot, IntegrityError, Refused, VmmDied
from coppice.machine import console, disk, disks, limits
from coppice.machine import directory as directories
from coppice.machine.identity import identity_message, next_serial
from coppice.machine.last_words import cure, of_start
from coppice.machine.loadable import differences
from coppice.machine.rooms import Rooms
from coppice.memory.layers import ranges_over
from coppice.memory.report import maps_privately, memory_at_rest, memory_report
from coppice.model import Capture, Instance, Manifest, MemoryReport, Sharing, State, VmmProcess
from coppice.timing import Stages
from coppice.vmm import driver as files
from coppice.vmm.driver import Launch

if TYPE_CHECKING:
    from coppice.linux.remap import Layer

T = TypeVar("T")
_DEATH_S = 5.0
_WATCH_S = 1.0
_DISK_ALONE = "use its disk alone: run `coppice fork NAME --target stopped`, then start the fork"


def require_same_host(made_on: Manifest, here: Manifest, name: str) -> None:
    """Refuse to load a vmstate on a host that differs from the one it was saved on.

    :raises IntegrityError: the message names each difference
    """
    if found := differences(made_on, here):
        raise IntegrityError(
            f"{name} was captured on a different host or VMM: {found}",
            hint=f"restore it on a host like that one, or {_DISK_ALONE}",
        )


async def require_loadable(rooms: Rooms, instance: Instance) -> None:
    """Refuse to capture a running machine if its capture could not be loaded: its VMM was updated
    meanwhile.

    :raises Refused: the message names each difference
    """
    if instance.manifest is None:
        raise AssertionError("a machine is started with its manifest")
    if found := differences(instance.manifest, await rooms.driver(instance).manifest(instance.machine)):
        raise Refused(
            f"a capture of {instance.name} made now could not be loaded: {found}",
            hint="reinstall the version that it was started with; "
            "or give up its memory: run `coppice stop NAME`, then `coppice start NAME`",
        )


async def own_disks(rooms: Rooms, instance: Instance) -> Instance:
    """Give an instance at rest disks that it may write to; return the record, saved if it has changed.

    :raises NoSpace: the disk is full
    """
    return await in_thread(_own_disks, rooms, instance)


def _own_disks(rooms: Rooms, instance: Instance) -> Instance:
    directory, driver = rooms.directory(instance.id), rooms.driver(instance)
    disks.remove_others(directory, instance)
    found = disks.of(instance)
    shared = {each.name for each in found if disk.is_frozen(directory, each)}
    if not shared:
        return instance
    current = directories.capture_is_current(directory, instance)
    owned = [disk.own(directory, each, driver, rooms.overlays) if each.name in shared else each for each in found]
    layers, capture = disks.recorded(owned), instance.capture
    if capture is not None and current:
        capture = directories.captured_here(capture, directory, layers)
    instance = msgspec.structs.replace(instance, disk_layers=layers, capture=capture)
    rooms.store.save(instance, durable=True)
    disks.remove_others(directory, instance)
    return instance


async def boot(
    rooms: Rooms,
    instance: Instance,
    stages: Stages,
    payload: bytes | None = None,
    *,
    done: bool = True,
    also: Callable[[Instance], None] | None = None,
) -> Instance:
    """Start a machine from its disks and a kernel; return the Running record, saved.

    :param payload: sent with the identity message
    :param done: also end the instance's operation in the journal
    :param also: called with that record, in the thread that has saved it
    :raises VmmDied: the machine ended before it answered
    :raises GuestTimeout: the guest did not answer in time
    """
    from coppice.machine import guest_kernel  # imported late: only a boot needs the reader of kernel modules

    directory = rooms.directory(instance.id)
    with stages.stage("prepare"):
        kernel = await in_thread(rooms.kernels.get, instance.machine.kernel)
        driver, has_nic = rooms.driver(instance), rooms.networks.of(instance.machine).backend is not None
        manifest = await driver.manifest(instance.machine)
        require = partial(guest_kernel.require, accel=manifest.accel, has_nic=has_nic)
        await in_thread(require, kernel, instance.machine, driver.capabilities)
        initrd = await in_thread(rooms.initrd, kernel, driver.capabilities.agent_device)
        await in_thread(directories.clear_runtime, directory)
        await in_thread(directories.place_kernel, directory, kernel.boot_image, initrd)
    instance = msgspec.structs.replace(instance, manifest=manifest, capture=None, process_end=None)
    return await _run(rooms, instance, stages, payload, booted=True, done=done, also=also)


async def restore(
    rooms: Rooms,
    instance: Instance,
    stages: Stages,
    payload: bytes | None = None,
    *,
    done: bool = True,
    checked: Ready | None = None,
    started: VmmProcess | None = None,
    also: Callable[[Instance], None] | None = None,
) -> Instance:
    """Start a machine from its captured memory; return the Running record, saved.

    :param payload: as for `boot`
    :param done: as for `boot`
    :param checked: what `check` returned, if it was called
    :param also: as for `boot`
    :param started: a paused VMM that has loaded the state already (see `coppice.fork.spare`)
    :raises IntegrityError: the capture was changed, or was made on a different host or VMM
    :raises VmmDied: the state could not be loaded
    :raises GuestTimeout: the guest did not acknowledge its identity in time
    """
    if instance.capture is None:
        raise IntegrityError(f"{instance.name} has no captured memory", hint=_DISK_ALONE)
    instance = msgspec.structs.replace(instance, manifest=instance.capture.manifest)
    return await _run(
        rooms, instance, stages, payload, booted=False, done=done, checked=checked, started=started, also=also
    )


async def require_restorable(rooms: Rooms, instance: Instance, capture: Capture) -> None:
    """Refuse a capture that this host cannot load.

    :raises IntegrityError: it was made on a different host or VMM
    :raises HostCannot: its memory has layers, which the VMM cannot map here
    """
    here = await rooms.driver(instance).manifest(instance.machine)
    require_same_host(capture.manifest, here, instance.name)
    if capture.layers and not rooms.driver(instance).capabilities.maps_layers:
        raise HostCannot(
            f"the memory of {instance.name} has layers, and its VMM cannot map layers on this host",
            hint=f"run `coppice fork {instance.name}`: a fork gets a copy of the memory as one file",
        )


class Ready(NamedTuple):
    """What `check` has found and made."""

    layers: tuple[Layer, ...] = ()
    cgroup: Path | None = None


async def launch(rooms: Rooms, instance: Instance, checked: Ready | None = None) -> Launch:
    """Make an instance ready to start: check its capture, attach its network, make its control
    group if it has limits. Return the parameters to start its VMM with.

    The code that ends the VMM also detaches the network and removes the group.

    :param checked: what `check` returned, if it was called
    :raises IntegrityError: the capture was changed, or was made on a different host or VMM
    :raises InUse: another program uses a port that the instance publishes
    :raises HostCannot: the network cannot be attached, or a limit be enforced, on this host
    """
    manifest = instance.capture.manifest if instance.capture else instance.manifest
    if manifest is None:
        raise AssertionError("a machine is started with its manifest")
    if instance.capture is not None:
        await require_restorable(rooms, instance, instance.capture)
    if checked is None:
        checked = await in_thread(check, rooms, instance)
    return Launch(
        directory=rooms.directory(instance.id),
        machine=instance.machine,
        disks=directories.devices(instance.machine, instance.disk_layers),
        nics=await rooms.networks.attach(instance, rooms.driver(instance).capabilities.nic_backends),
        manifest=manifest,
        layers=checked.layers,
        user=instance.vmm_user,
        cgroup=checked.cgroup,
    )


def check(rooms: Rooms, instance: Instance) -> Ready:
    """Check a capture before a start, place the kernel stubs that a restore needs, and make the control group. Blocks.

    :raises IntegrityError: the capture was changed
    :raises HostCannot: a limit cannot be enforced on this host
    """
    directory, capture = rooms.directory(instance.id), instance.capture
    layers: tuple[Layer, ...] = ()
    if capture is not None:
        directories.check_memory(directory, capture)
        directories.require_current(directory, instance)
        directories.place_kernel(directory, *rooms.kernels.stub(instance.machine.kernel))
        layers = ranges_over(directory / files.MEMORY, capture.layers) if capture.layers else ()
    directories.trim_logs(directory)
    return Ready(layers, limits.prepare(instance, directory))


async def _run(
    rooms: Rooms,
    instance: Instance,
    stages: Stages,
    payload: bytes | None,
    *,
    booted: bool,
    done: bool,
    checked: Ready | None = None,
    started: VmmProcess | None = None,
    also: Callable[[Instance], None] | None = None,
) -> Instance:
    directory, driver = rooms.directory(instance.id), rooms.driver(instance)
    process = started
    prepared = None
    if process is None:
        with stages.stage("check"):
            prepared = await launch(rooms, instance, checked)
    console_from = console.size(directory)  # before the guest writes to it
    known_as = instance  # the record that remains if the start fails (a new instance is then removed)

    def begun(process: VmmProcess) -> None:
        nonlocal instance
        instance = msgspec.structs.replace(
            instance,
            state=State.INITIALIZING,
            vmm=process,
            started_at=time.time(),
            console_from=console_from,
            exit_reason=None,
        )
        rooms.store.save(instance)

    def answered() -> None:
        with stages.stage("record"):
            rooms.store.save(instance, done=done)
        if also is not None:
            also(instance)

    try:
        with stages.stage("start"):
            if started is not None:
                await rooms.networks.of(instance.machine).permit(instance)  # it was attached as its template
                await driver.resume(directory)
                await in_thread(begun, started)
            elif prepared is not None:
                prepared = msgspec.structs.replace(prepared, record=begun)
                process = await (driver.boot if booted else driver.restore)(prepared)
        if instance.publish:
            with stages.stage("publish"):
                published = await rooms.networks.of(instance.machine).published(instance)
                instance = msgspec.structs.replace(instance, publish=published)
        with stages.stage("ready"):
            deadline_s = rooms.deadlines.boot if booted else rooms.deadlines.ready
            runs = started is not None
            introduction = _introduce(rooms, instance, known_as, deadline_s, payload, booted=booted, runs=runs)
            taken = await _unless_vmm_dies(rooms, instance, known_as, introduction)
        if instance.process.notify is not None and not booted and not instance.identified:
            from coppice.machine.notice import deliver  # imported late: few forks have one

            with stages.stage("notice"):
                await _unless_vmm_dies(rooms, instance, known_as, deliver(rooms, instance, payload))
        instance = msgspec.structs.replace(
            instance,
            state=State.RUNNING,
            identity_serial=next_serial(instance),
            identified=True,
            ending=None,
            process_end=taken.process_end,
        )
        await in_thread(answered)
        return instance
    except BaseException:
        if process is not None:
            with contextlib.suppress(CoppiceError):
                await complete(driver.quit(directory, process))
        raise


async def _introduce(
    rooms: Rooms,
    instance: Instance,
    known_as: Instance,
    deadline_s: float,
    payload: bytes | None,
    *,
    booted: bool,
    runs: bool,
) -> Acknowledged:
    """Send the identity message, and return its acknowledgement."""
    try:
        async with asyncio.timeout(deadline_s):
            network = rooms.networks.of(instance.machine).guest(instance)
            message = partial(identity_message, instance, network, booted=booted, payload=payload)
            if booted:
                # The message carries the time, which would be stale if it waited for the boot to
                # end.
                async with rooms.ports(instance).control(deadline_s) as control:
                    await control.health()
                    taken = await control.identity(message())
            else:
                may_lose = instance.manifest is not None and rooms.driver(instance).loses_connections(instance.manifest)
                taken = await rooms.ports(instance).identify(message, deadline_s, runs=runs, may_lose=may_lose)
        if instance.capture is not None:
            await rooms.ports(instance).hang_up(instance.capture.open_ports, deadline_s)
    except TimeoutError as error:
        words = await in_thread(of_start, rooms.directory(instance.id) / files.CONSOLE_LOG)
        raise GuestTimeout(
            _sentence(f"{instance.name} did not answer within {deadline_s:g} s", words),
            hint=cure(known_as, words),
        ) from error
    return taken


async def _unless_vmm_dies(rooms: Rooms, instance: Instance, known_as: Instance, work: Awaitable[T]) -> T:
    """Await `work`, but no longer than the VMM lives.

    :raises VmmDied: the VMM ended first; the message has the reason from its log and the guest's
        console
    """
    if instance.vmm is None:
        raise AssertionError("only an instance with a VMM can be waited for")
    directory, driver, vmm = rooms.directory(instance.id), rooms.driver(instance), instance.vmm
    loop = asyncio.get_running_loop()

    async def watch() -> None:
        await driver.wait_exit(directory, vmm)
        limit.reschedule(loop.time())

    failure: Exception
    try:
        # A VMM's end breaks the connection to its guest. Only the wait for a connection does not notice it.
        async with asyncio.timeout(None) as limit, later(_WATCH_S, watch):
            return await work
    except TimeoutError as error:
        failure = error
    except CoppiceError as error:
        if not isinstance(error, VmmDied) and driver.alive(vmm):
            raise
        failure = error
    try:
        async with asyncio.timeout(_DEATH_S):  # a VMM's ports close shortly before its end
            reason = await driver.wait_exit(directory, vmm)
    except TimeoutError:
        raise failure from None
    words = await in_thread(of_start, directory / files.CONSOLE_LOG)
    reason = await in_thread(limits.exceeded, instance, directory) or reason
    raise VmmDied(
        _sentence(f"the machine of {instance.name} ended before it answered: {reason}", words),
        hint=cure(known_as, words),
    ) from failure


def _sentence(what: str, words: str) -> str:
    return f"{what}; {words}" if words else what


def verified_sharing(rooms: Rooms, instance: Instance) -> Sharing | None:
    """Return how the running VMM really has its memory: an undeclared copy shows as `copy`. Blocks."""
    capture, vmm, memory = instance.capture, instance.vmm, f"{rooms.directory(instance.id)}/{files.MEMORY}"
    if capture is not None and vmm is not None and maps_privately(vmm.pid, memory):
        return (capture.copied or capture.mem_file).sharing
    return memory_of(rooms, instance).sharing


def memory_of(rooms: Rooms, instance: Instance) -> MemoryReport:
    """Report the memory that the VMM really shares: an undeclared copy shows as `copy`. Blocks."""
    pid = instance.vmm.pid if instance.vmm else None
    capture = instance.capture
    if pid is None and capture is not None:
        path = f"{rooms.layout.instances}/{instance.id}/{files.MEMORY}"
        return memory_at_rest(capture.copied or capture.mem_file, path, len(capture.layers))
    directory = rooms.directory(instance.id)
    file = (capture.copied or capture.mem_file) if capture else None
    base, *layers = directories.memory_paths(directory, capture) if capture else [directory / files.LIVE_MEMORY]
    # A first boot on anonymous memory has no file.
    in_file = capture is not None or rooms.driver(instance).capabilities.boots_in_file
    return memory_report(pid, file, base, layers, memory_bytes=None if in_file else instance.machine.memory_bytes)
