"""The QEMU driver: runs anywhere, under TCG or KVM.

Capture: `stop`, then `xen-save-devices-state`. Despite its name, every QEMU has this command. It
writes the state of all devices without RAM (qemu.org, QMP reference, "migration"), takes about 5
ms, and leaves the machine resumable. The RAM of a first boot is in its file already. After a
restore, RAM is in private pages, which the caller collects.

Restore: `-incoming` reads that state; guest RAM is the mem-file mapped MAP_PRIVATE. QEMU reads the
guest's memory while it loads the state. So if the memory has layers, QEMU gets the state through a
pipe, and the layers are mapped before the first byte is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import socket
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import NoSpace, VmmDied, VmmError, VmmTimeout
from coppice.linux.files import os_errors
from coppice.linux.kvm import read_cpu
from coppice.model import MIB, MachineSpec, Manifest, VmmProcess
from coppice.model.network import NicBackend
from coppice.names import check_accel
from coppice.vmm import confinement, layers, sockets, starting, taps
from coppice.vmm import driver as files
from coppice.vmm import process as processes
from coppice.vmm import program as programs
from coppice.vmm.driver import Capabilities, Launch, Saved, VmmDriver
from coppice.vmm.qemu import chain, command, host, images, qcow2, releases
from coppice.vmm.starting import Rights

if TYPE_CHECKING:
    from coppice.vmm.qemu.monitor import Monitor

_OWN_BYTES = 40 * MIB  # of its heap and stacks, without translated code
_PIPE_BYTES = 1 << 16
_FEED_S = 60.0  # without a byte read
# QEMU starts as root, opens its files, and drops root: no user but root can open its files, or the
# devices of every host. These capabilities are the most that it can have until then: to open files
# of another user, to change its user, and to publish ports below 1024.
_UNTIL_IT_DROPS_ROOT = 1 << 1 | 1 << 6 | 1 << 7 | 1 << 10  # DAC_OVERRIDE, SETGID, SETUID, NET_BIND_SERVICE


def monitor(directory: Path, socket_name: str) -> AbstractAsyncContextManager[Monitor]:
    """Open a conversation. Imported late, because listing machines needs none."""
    from coppice.vmm.qemu.monitor import monitor

    return monitor(directory, socket_name)


class QemuDriver(VmmDriver):
    """QEMU with the microvm machine. `accel` is `auto`, `tcg` or `kvm`."""

    def __init__(self, accel: str = "auto") -> None:
        """Make a driver.

        :raises UsageError: `accel` is none of the three
        """
        self._wanted_accel = check_accel(accel)

    @property
    def name(self) -> str:
        return "qemu"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            maps_mem_file_privately=True,
            maps_layers=layers.mappable(),
            observable=layers.mappable(),
            boots_in_file=True,
            restores_paused=True,
            nic_backends=frozenset({NicBackend.USER_MODE, NicBackend.TAP, NicBackend.STREAM}),
            enters_by_pvh=True,
            layer_format=releases.LAYER_FORMAT,
            switches_layers=True,
        )

    def vmm_bytes(self, machine: MachineSpec) -> int:
        accel = host.choose_accel(self._wanted_accel, read_cpu())
        return _OWN_BYTES + (command.translation_bytes(machine) if accel == "tcg" else 0)

    async def manifest(self, machine: MachineSpec) -> Manifest:
        cpu = read_cpu()
        accel = host.choose_accel(self._wanted_accel, cpu)
        return Manifest(
            driver=self.name,
            vmm_version=await host.version(),
            machine=command.machine_type(machine),
            accel=accel,
            cpu_model="max" if accel == "tcg" else host.kvm_cpu_model(cpu),
            cpu_flags="" if accel == "tcg" else cpu.flags_digest,  # TCG's CPU is the same on every host
            kernel=machine.kernel,
            memory_bytes=machine.memory_bytes,
            cpus=machine.cpus,
            tsc_khz=await host.tsc_khz(host.QUICK_S) if accel == "tcg" else 0,
        )

    async def boot(self, launch: Launch) -> VmmProcess:
        command.require_buses(launch.machine, len(launch.disks) + len(launch.nics))
        tsc_khz = await host.tsc_khz(host.EXACT_S)
        line = command.kernel_command_line(launch.manifest.accel, tsc_khz)
        process = await starting.start_in_thread(launch, self._start, command.boot_arguments(launch.machine, line))
        return await self._settle(launch.directory, process)

    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        if launch.layers:
            return await self._restore_layers(launch, paused=paused)
        release = programs.release(launch.manifest.vmm_version)
        with contextlib.ExitStack() as stack:
            vmstate = None
            if not releases.opens_vmstate(release):
                with os_errors("open the device state"):
                    vmstate = os.open(launch.directory / files.VMSTATE, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, vmstate)
            arguments = command.restore_arguments(launch.machine, vmstate, release, paused=paused)
            inherit = () if vmstate is None else (vmstate,)
            process = await starting.start_in_thread(launch, self._start, arguments, *inherit)
        return await self._settle(launch.directory, process)

    async def _restore_layers(self, launch: Launch, *, paused: bool) -> VmmProcess:
        from coppice.linux.remap import lay_over

        directory, release = launch.directory, programs.release(launch.manifest.vmm_version)
        with contextlib.ExitStack() as kept:
            with os_errors("open the device state"):
                vmstate = os.open(directory / files.VMSTATE, os.O_RDONLY | os.O_CLOEXEC)
                kept.callback(os.close, vmstate)
                reading, writing = os.pipe2(os.O_CLOEXEC)
                kept.callback(os.close, writing)
            with contextlib.ExitStack() as inherited:
                inherited.callback(os.close, reading)
                opened = inherited.enter_context(layers.opened(launch))
                arguments = command.restore_arguments(launch.machine, reading, release, paused=paused)
                process = await starting.start_in_thread(launch, self._start, arguments, reading, *opened)
            try:
                await self._settle(directory, process)
                await self.is_paused(directory)  # an answer means that QEMU has mapped its memory
                await in_thread(lay_over, process.pid, directory / files.MEMORY, launch.layers)
                await in_thread(_feed, writing, vmstate)
            except BaseException as error:
                await complete(processes.kill(process))
                if isinstance(error, VmmDied):  # its log has the reason
                    said = await self.wait_exit(directory, process)
                    raise _ended_at_once(said) from error
                raise
        return process

    def _start(self, launch: Launch, arguments: list[str], *inherit: int) -> VmmProcess:
        from coppice.vmm import helpers  # imports tempfile, and listing machines does not need it

        release = programs.release(launch.manifest.vmm_version)
        program, user = host.program(), confinement.own_user(launch.user)
        names = [command.QMP_SOCKET, *(command.PORT_SOCKET.format(port) for port in range(files.PORTS))]
        with taps.opened(launch.nics) as tap_fds, helpers.started(launch.nics) as helper_fds:

            def argv(first: int) -> list[str]:
                machine = command.machine_arguments(
                    program,
                    release=release,
                    accel=launch.manifest.accel,
                    cpu_model=launch.manifest.cpu_model,
                    machine=launch.machine,
                    disks=launch.disks,
                    nics=launch.nics,
                    socket_fds={name: first + number for number, name in enumerate(names)},
                    nic_fds=tap_fds | helper_fds,
                    run_as=user,
                )
                return [*machine, *arguments]

            return starting.spawn(
                argv,
                cwd=launch.directory,
                log=launch.directory / files.VMM_LOG,
                pass_fds=(*tap_fds.values(), *helper_fds.values(), *inherit),
                listen=names,  # they exist before QEMU starts, so no caller has to poll for them
                rights=_rights(launch, program, release, user),
            )

    async def _settle(self, directory: Path, process: VmmProcess) -> VmmProcess:
        """Return the process, or raise at once if it has ended already."""
        if not process.start_ticks:
            raise _ended_at_once(await self.wait_exit(directory, process))
        return process

    def make_layer(self, path: Path, size_bytes: int) -> None:
        images.create(path, size_bytes)

    def merge_layers(self, base: Path, merged: Path, above: Sequence[Path]) -> None:
        images.merge(base, merged, above)

    def flatten_disk(self, base: Path, layers: Sequence[Path], out: Path) -> None:
        images.flatten(base, layers, out)

    async def disks_in_use(self, directory: Path) -> tuple[tuple[str, ...], ...]:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            return await chain.in_use(qmp)

    async def prepare_switch(self, directory: Path, disk: Sequence[str]) -> None:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            await chain.prepare(qmp, directory, disk)

    async def switch_layers(self, directory: Path, disks: Sequence[Sequence[str]]) -> None:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            await chain.switch(qmp, disks)

    async def finish_switch(self, directory: Path, disk: Sequence[str]) -> None:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            await chain.finish(qmp, directory, disk)

    async def replace_below(self, directory: Path, disk: Sequence[str]) -> None:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            await chain.replace(qmp, directory, disk)

    def check_layer(self, path: Path, size_bytes: int) -> None:
        qcow2.check(path, size_bytes)

    async def dial(self, directory: Path, port: int) -> socket.socket:
        return sockets.connect(directory, command.PORT_SOCKET.format(port))

    async def pause(self, directory: Path) -> None:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            await qmp.execute("stop")
            # `stop` writes back the disks, with the tables of their layers, but does not report a failure.
            await chain.flush(qmp)

    async def resume(self, directory: Path) -> None:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            await qmp.execute("cont")

    async def save(self, directory: Path) -> Saved:
        await self._save_devices(directory)
        # After a first boot RAM is LIVE_MEMORY; after a restore it is private pages over the
        # mem-file.
        return Saved.IN_FILE if (directory / files.LIVE_MEMORY).exists() else Saved.IN_PROCESS

    async def _save_devices(self, directory: Path) -> None:
        # QEMU has dropped root and cannot open files, so it receives an open one.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os_errors("make the file of the device state"):
            descriptor = os.open(directory / files.VMSTATE_NEW, flags, 0o600)
        try:
            async with monitor(directory, command.QMP_SOCKET) as qmp:
                qmp.send_file(descriptor)
                fdset = await qmp.ask("add-fd", "fdset-id", int)
                refusal: VmmError | None = None
                try:
                    # live=False: with True, QEMU would release the disks as after a migration.
                    path = f"/dev/fdset/{fdset}"
                    await qmp.execute("xen-save-devices-state", {"filename": path, "live": False})
                except VmmError as error:
                    refusal = error
                # Skipped if QEMU did not answer, so that no second wait follows the one that timed
                # out. QEMU closes the file by itself at the end of the conversation.
                await qmp.execute("remove-fd", {"fdset-id": fdset})
                if refusal is not None:
                    if os.fstatvfs(descriptor).f_bavail == 0:  # QEMU reports only an I/O error
                        raise NoSpace(
                            "the disk is full: the machine's state could not be saved", hint="free disk space"
                        ) from refusal
                    raise refusal
        finally:
            os.close(descriptor)

    async def is_paused(self, directory: Path) -> bool:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            return not await qmp.ask("query-status", "running", bool)

    async def quit(self, directory: Path, process: VmmProcess) -> None:  # noqa: ARG002 - other drivers have files to tidy
        # SIGKILL instead of QMP's quit: the raw disks go through the page cache, so QEMU has
        # nothing to flush.
        await processes.kill(process)

    async def wait_exit(self, directory: Path, process: VmmProcess) -> str:
        status = await processes.wait_exit(process)
        return await asyncio.to_thread(processes.exit_reason, directory / files.VMM_LOG, status, _last_words)

    def alive(self, process: VmmProcess) -> bool:
        return processes.is_alive(process)

    def find_orphans(self, instances: Path) -> dict[Path, list[VmmProcess]]:
        return processes.by_working_directory(instances, [host.PROGRAM])


def _feed(pipe: int, vmstate: int) -> None:
    """Write the device state to QEMU's pipe.

    A QEMU that ends meanwhile is not an error here: the waiter for the guest reports it.

    :raises VmmTimeout: QEMU does not read
    """
    os.set_blocking(pipe, False)
    writable = select.poll()
    writable.register(pipe, select.POLLOUT)
    while data := os.read(vmstate, _PIPE_BYTES):
        with memoryview(data) as left:
            done = 0
            while done < len(left):
                if not writable.poll(_FEED_S * 1000):
                    raise VmmTimeout(
                        f"QEMU did not read its device state within {_FEED_S:g} s",
                        hint="see its log with `coppice logs --vmm NAME`",
                    )
                try:
                    done += os.write(pipe, left[done:])
                except BrokenPipeError:
                    return


def _ended_at_once(said: str) -> VmmDied:
    return VmmDied(f"QEMU ended at once: {said}", hint="run `coppice doctor`, which checks QEMU's requirements")


def _rights(launch: Launch, program: str, release: releases.Release, user: int | None) -> Rights:
    rights = confinement.rights(launch, program)
    if user is not None:
        return msgspec.structs.replace(rights, capabilities=_UNTIL_IT_DROPS_ROOT)
    # QEMU before 8.2 opens a mem-file for writing even if it maps it privately, and mode 0444
    # permits that to root only.
    return msgspec.structs.replace(rights, own_user_namespace=release < releases.READ_ONLY_RAM)


def _last_words(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return re.sub(r"^qemu-system-\w+: ", "", lines[-1]) if lines else ""
