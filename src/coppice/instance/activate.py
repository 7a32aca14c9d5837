"""From files to Running: start the VMM, give the guest its identity, verify what is shared.

Ready means that the guest answered, as itself. Whatever fails on the way ends the VMM; the machine is not called Running.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from typing import TypeVar

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError, GuestTimeout, IntegrityError, Refused, VmmDied
from coppice.instance import directory as directories
from coppice.instance import ports
from coppice.instance.identity import identity_message, mac_address
from coppice.instance.last_words import cure, of_start
from coppice.instance.rooms import Rooms
from coppice.memory import memfile
from coppice.memory.report import memory_report
from coppice.model import ANY_PORT, Instance, Manifest, MemFile, MemoryReport, State, VmmProcess
from coppice.timing import Stages
from coppice.vmm import driver as files
from coppice.vmm.driver import Launch

T = TypeVar("T")
_DEATH_S = 5.0
TSC_TOLERANCE = 0.002  # measured anew, and quickly, by each process
_DISK_ALONE = "take its disk alone with `coppice fork NAME --target stopped`, and start that"


def require_same_host(made_on: Manifest, here: Manifest, name: str) -> None:
    """Refuse to load a vmstate into anything else than what it was saved from.

    :raises IntegrityError: the message names each difference
    """
    if differences := _differences(made_on, here):
        raise IntegrityError(
            f"{name} was captured on something else: {differences}",
            hint=f"restore it where it was captured, or {_DISK_ALONE}",
        )


async def require_loadable(rooms: Rooms, instance: Instance) -> None:
    """Refuse to capture a machine that runs, where what is captured could not be loaded here: its VMM was updated meanwhile.

    :raises Refused: the message names each difference
    """
    if instance.manifest is None:
        raise AssertionError("a machine is started with its manifest")
    if differences := _differences(instance.manifest, await rooms.driver.manifest(instance.machine)):
        raise Refused(
            f"what is captured of {instance.name} now could not be loaded: {differences}",
            hint="install again what it was started with; or give up what it has in memory, with `coppice stop NAME` and `coppice start NAME`",
        )


def _differences(then: Manifest, now: Manifest) -> str:
    return "; ".join(
        f"{field.replace('_', ' ')} was {before or 'none'}, is {after or 'none'}"
        for field in Manifest.__struct_fields__
        if (before := getattr(then, field)) != (after := getattr(now, field))
        and not (field == "tsc_khz" and abs(before - after) <= TSC_TOLERANCE * before)
    )


async def boot(
    rooms: Rooms, instance: Instance, stages: Stages, payload: bytes | None = None, *, done: bool = True
) -> Instance:
    """Start a machine from its disks and a kernel; return the Running record, saved. `payload` goes with the identity message.

    With `done` this ends the operation that the journal has for the instance.

    :raises VmmDied: the machine ended before it answered
    :raises GuestTimeout: it did not answer in time
    """
    directory = rooms.directory(instance.id)
    with stages.stage("prepare"):
        kernel = await in_thread(rooms.kernels.get, instance.machine.kernel)
        initrd = await in_thread(rooms.initrd, kernel)
        await in_thread(directories.clear_runtime, directory)
        await in_thread(directories.place_kernel, directory, kernel.boot_image, initrd)
        manifest = await rooms.driver.manifest(instance.machine)
    instance = msgspec.structs.replace(instance, manifest=manifest, mem_file=None, captured_at=None)
    return await _run(rooms, instance, stages, payload, booted=True, done=done)


async def restore(
    rooms: Rooms,
    instance: Instance,
    stages: Stages,
    payload: bytes | None = None,
    *,
    done: bool = True,
    started: VmmProcess | None = None,
) -> Instance:
    """Start a machine from its captured memory; return the Running record, saved. `payload` and `done` are those of `boot`.

    With `started` that has been done but for the last step: the VMM has loaded the state (see `coppice.fork.spare`), and the guest has not run.

    :raises IntegrityError: the capture is not what it was, or was made on something else
    :raises VmmDied: the state could not be loaded
    :raises GuestTimeout: the guest did not acknowledge who it is in time
    """
    if started is None:
        with stages.stage("check"):
            await check(rooms, instance)
    return await _run(rooms, instance, stages, payload, booted=False, done=done, started=started)


async def check(rooms: Rooms, instance: Instance) -> None:
    """See that what was captured can be restored here, and that all a restore needs is in the instance's directory.

    :raises IntegrityError: the capture is not what it was, or was made on something else
    """
    if instance.mem_file is None or instance.manifest is None:
        raise IntegrityError(f"{instance.name} has no captured memory", hint=_DISK_ALONE)
    require_same_host(instance.manifest, await rooms.driver.manifest(instance.machine), instance.name)
    await in_thread(_check_files, rooms, instance, instance.mem_file)


def _check_files(rooms: Rooms, instance: Instance, mem_file: MemFile) -> None:
    directory = rooms.directory(instance.id)
    memfile.check(directory / files.MEMORY, mem_file)
    directories.require_current(directory, instance)
    stub = rooms.kernels.stub(rooms.kernels.get(instance.machine.kernel))
    directories.place_kernel(directory, *stub)


def launch(rooms: Rooms, instance: Instance) -> Launch:
    """What the VMM of an instance is started with."""
    if instance.manifest is None:
        raise AssertionError("a machine is started with its manifest")
    return Launch(
        directory=rooms.directory(instance.id),
        machine=instance.machine,
        mac=mac_address(instance.id),
        publish=instance.publish,
        manifest=instance.manifest,
    )


async def _run(
    rooms: Rooms,
    instance: Instance,
    stages: Stages,
    payload: bytes | None,
    *,
    booted: bool,
    done: bool,
    started: VmmProcess | None = None,
) -> Instance:
    directory = rooms.directory(instance.id)
    process = started
    if instance.publish:
        await in_thread(ports.require_free, instance)
    await in_thread(directories.trim_logs, directory)
    known_as = instance  # as it was before; if it fails, it is that again, or where it was new, gone
    try:
        with stages.stage("start"):
            if process is not None:
                await rooms.driver.resume(directory)
            else:
                process = await (rooms.driver.boot if booted else rooms.driver.restore)(launch(rooms, instance))
            instance = msgspec.structs.replace(
                instance, state=State.INITIALIZING, vmm=process, started_at=time.time(), exit_reason=None
            )
            await in_thread(rooms.store.save, instance)
        if any(port.host_port == ANY_PORT for port in instance.publish):
            with stages.stage("publish"):
                asked = rooms.driver.published(directory, instance.publish)
                instance = msgspec.structs.replace(
                    instance, publish=await _unless_vmm_dies(rooms, instance, known_as, asked)
                )
        with stages.stage("ready"):
            deadline_s = rooms.deadlines.boot if booted else rooms.deadlines.ready
            introduction = _introduce(rooms, instance, known_as, deadline_s, payload, booted=booted)
            await _unless_vmm_dies(rooms, instance, known_as, introduction)
        instance = msgspec.structs.replace(
            instance,
            state=State.RUNNING,
            identity_serial=instance.identity_serial + 1,
            identified=True,
            open_ports=(),
            frozen=False,
        )
        with stages.stage("record"):
            await in_thread(rooms.store.save, instance, done=done)
        return instance
    except BaseException:
        if process is not None:
            with contextlib.suppress(CoppiceError):
                await complete(rooms.driver.quit(directory, process))
        raise


async def _introduce(
    rooms: Rooms, instance: Instance, known_as: Instance, deadline_s: float, payload: bytes | None, *, booted: bool
) -> None:
    """Send the identity message and wait for its acknowledgement."""
    try:
        async with asyncio.timeout(deadline_s), rooms.ports(instance.id).control(deadline_s) as control:
            if booted:
                # The message tells the time, and would wait for all of the boot: first see that somebody is there to read it.
                await control.health()
            await control.identity(identity_message(instance, booted=booted, payload=payload))
        await rooms.ports(instance.id).hang_up(instance.open_ports, deadline_s)
    except TimeoutError as error:
        words = await in_thread(of_start, rooms.directory(instance.id) / files.CONSOLE_LOG)
        raise GuestTimeout(
            _sentence(f"{instance.name} did not answer within {deadline_s:g} s", words),
            hint=cure(known_as, words),
        ) from error


async def _unless_vmm_dies(rooms: Rooms, instance: Instance, known_as: Instance, work: Awaitable[T]) -> T:
    """Await `work`, but no longer than the VMM lives.

    :raises VmmDied: the VMM ended first; the message says why, as far as its log and the guest's console tell
    """
    if instance.vmm is None:
        raise AssertionError("only an instance with a VMM can be waited for")
    directory = rooms.directory(instance.id)
    task = asyncio.ensure_future(work)
    death = asyncio.ensure_future(rooms.driver.wait_exit(directory, instance.vmm))
    try:
        await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and isinstance(task.exception(), VmmDied):
            await asyncio.wait({death}, timeout=_DEATH_S)  # its ports are closed before it is gone
        if not death.done() or (task.done() and task.exception() is None):
            return task.result()
        words = await in_thread(of_start, directory / files.CONSOLE_LOG)
        raise VmmDied(
            _sentence(f"the machine of {instance.name} ended before it answered: {death.result()}", words),
            hint=cure(known_as, words),
        )
    finally:
        for pending in (task, death):
            if not pending.done():
                pending.cancel()
        await asyncio.gather(task, death, return_exceptions=True)


def _sentence(what: str, words: str) -> str:
    return f"{what}; {words}" if words else what


async def verify_sharing(rooms: Rooms, instance: Instance) -> MemoryReport:
    """Read from the kernel what the VMM really shares: a driver that copied in silence is reported as `copy`."""
    pid = instance.vmm.pid if instance.vmm else None
    path = rooms.directory(instance.id) / (files.MEMORY if instance.mem_file else files.LIVE_MEMORY)
    return await in_thread(memory_report, pid, instance.mem_file, path)
