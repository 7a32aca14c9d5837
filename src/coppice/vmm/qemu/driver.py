"""The QEMU driver: runs anywhere, under TCG or KVM.

Capture: `stop`, then `xen-save-devices-state`, which despite its name is built into every QEMU and writes the state of all devices
without RAM (docs: qemu.org, QMP reference, "migration"). It works alike for RAM in a shared file and on a private mapping, takes about a
millisecond, and leaves the machine resumable. RAM is either in its file already (first boot), or collected by the memory room.

Restore: `-incoming` reads that state; guest RAM is the mem-file mapped MAP_PRIVATE.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from coppice.errors import CoppiceError, HostCannot, NoSpace, VmmDied, VmmError
from coppice.model import MachineSpec, Manifest, Publish, VmmProcess
from coppice.vmm import driver as files
from coppice.vmm import process as processes
from coppice.vmm.driver import Capabilities, Launch, VmmDriver
from coppice.vmm.qemu import command, host, ports
from coppice.vmm.qemu.monitor import monitor

_LOG_TAIL = 2000
# QEMU before 8.2 opens a mem-file for writing even where it maps it privately, and mode 0444 forbids that to everybody but root. In a user namespace of
# its own it is root of its own files, and of nothing else.
_ROOT_OF_ITS_OWN = ("unshare", "--user", "--map-root-user")
_NOBODY = 65534
_FIRST_USER = 0x40000000  # far above what distributions, containers and systemd hand out


class QemuDriver(VmmDriver):
    """QEMU with the microvm machine. `accel` is `auto`, `tcg` or `kvm`."""

    def __init__(self, accel: str = "auto") -> None:
        self._wanted_accel = accel

    @property
    def name(self) -> str:
        return "qemu"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            maps_mem_file_privately=True,
            boots_in_file=True,
            restores_without_kernel=True,
            restores_paused=True,
            user_mode_network=True,
            relative_paths=True,
        )

    async def manifest(self, machine: MachineSpec) -> Manifest:
        cpu = host.read_cpu()
        accel = host.choose_accel(self._wanted_accel, cpu)
        return Manifest(
            driver=self.name,
            vmm_version=await host.version(),
            machine=command.MACHINE,
            accel=accel,
            cpu_model="max" if accel == "tcg" else "host",
            cpu_flags="" if accel == "tcg" else cpu.flags_digest,  # TCG's CPU is the same on every host
            kernel=machine.kernel,
            memory_bytes=machine.memory_bytes,
            cpus=machine.cpus,
            tsc_khz=await asyncio.to_thread(host.tsc_khz, host.QUICK_S) if accel == "tcg" else 0,
        )

    async def boot(self, launch: Launch) -> VmmProcess:
        tsc_khz = await asyncio.to_thread(host.tsc_khz, host.EXACT_S)
        line = command.kernel_command_line(launch.manifest.accel, tsc_khz)
        process = await processes.start_in_thread(self._start, launch, command.boot_arguments(launch.machine, line))
        return await self._settle(launch.directory, process)

    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        vmstate = os.open(launch.directory / files.VMSTATE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            arguments = command.restore_arguments(
                launch.machine, vmstate, host.release(launch.manifest.vmm_version), paused=paused
            )
            process = await processes.start_in_thread(self._start, launch, arguments, vmstate)
        finally:
            os.close(vmstate)
        return await self._settle(launch.directory, process)

    def _start(self, launch: Launch, arguments: list[str], *inherit: int) -> VmmProcess:
        release = host.release(launch.manifest.vmm_version)
        with _listening_sockets(launch.directory) as sockets:
            argv = command.machine_arguments(
                host.PROGRAM,
                release=release,
                accel=launch.manifest.accel,
                cpu_model=launch.manifest.cpu_model,
                machine=launch.machine,
                mac=launch.mac,
                publish=launch.publish,
                socket_fds=sockets,
                run_as=_unprivileged_user(launch.directory.name),
            )
            launcher = [] if os.geteuid() == 0 or release >= command.READ_ONLY_RAM else list(_ROOT_OF_ITS_OWN)
            program = shutil.which(host.PROGRAM)
            return processes.spawn(
                [*launcher, *argv, *arguments],
                cwd=launch.directory,
                log=launch.directory / files.VMM_LOG,
                pass_fds=(*sockets.values(), *inherit),
                becomes=str(Path(program).resolve()) if program and launcher else None,
                # The guest's disks and RAM, which it was granted, and what it writes to its console, which would have no end else.
                largest_file=max(
                    launch.machine.overlay_bytes,
                    launch.machine.memory_bytes,
                    *(disk.size_bytes for disk in launch.machine.volumes if not disk.readonly),
                ),
            )

    async def _settle(self, directory: Path, process: VmmProcess) -> VmmProcess:
        """A process that has ended already is an error now, and not a time-out later."""
        if not process.start_ticks:
            raise ended_at_once(await self.wait_exit(directory, process))
        return process

    async def published(self, directory: Path, asked: tuple[Publish, ...]) -> tuple[Publish, ...]:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            said = await qmp.execute("human-monitor-command", {"command-line": "info usernet"})
        return ports.with_picked(asked, str(said))

    async def pause(self, directory: Path) -> None:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            await qmp.execute("stop")

    async def resume(self, directory: Path) -> None:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            await qmp.execute("cont")

    async def save_devices(self, directory: Path) -> None:
        # QEMU has given up root and cannot open files: it is handed this one.
        descriptor = os.open(
            directory / files.VMSTATE_NEW, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            async with monitor(directory, command.QMP_SOCKET) as qmp:
                qmp.send_file(descriptor)
                added = await qmp.execute("add-fd")
                refusal: VmmError | None = None
                try:
                    # live=False keeps the disks ours: with True, QEMU would give them up as after a migration.
                    path = f"/dev/fdset/{added['fdset-id']}"
                    await qmp.execute("xen-save-devices-state", {"filename": path, "live": False})
                except VmmError as error:
                    refusal = error
                # Only of a QEMU that has answered: the deadline cuts one wait short, and not another that comes behind it. Else QEMU gives the
                # file up by itself, at the end of a conversation.
                await qmp.execute("remove-fd", {"fdset-id": added["fdset-id"]})
                if refusal is not None:
                    if os.fstatvfs(descriptor).f_bavail == 0:  # QEMU says no more than "an IO error"
                        raise NoSpace(
                            "the disk is full: the machine's state could not be saved", hint="free some space"
                        ) from refusal
                    raise refusal
        finally:
            os.close(descriptor)

    async def is_paused(self, directory: Path) -> bool:
        async with monitor(directory, command.QMP_SOCKET) as qmp:
            status = await qmp.execute("query-status")
        return not status["running"]

    async def quit(self, directory: Path, process: VmmProcess) -> None:  # noqa: ARG002 - other drivers have files to tidy
        # SIGKILL and not QMP's quit: the disks are raw files written through the page cache, so there is nothing to flush.
        await processes.kill(process)

    async def wait_exit(self, directory: Path, process: VmmProcess) -> str:
        status = await processes.wait_exit(process)
        return await asyncio.to_thread(_exit_reason, directory / files.VMM_LOG, status)

    def alive(self, process: VmmProcess) -> bool:
        return processes.is_alive(process)

    def find_orphans(self, instances: Path) -> dict[Path, list[VmmProcess]]:
        return processes.by_working_directory(instances, [host.PROGRAM])


def ended_at_once(said: str) -> CoppiceError:
    """The error of a QEMU, or of the launcher before it, that said this and ended."""
    if said.startswith(f"{_ROOT_OF_ITS_OWN[0]}: "):
        return HostCannot(
            f"QEMU before {'.'.join(map(str, command.READ_ONLY_RAM))} needs a user namespace, and this user can have none ({said})",
            hint="`coppice doctor` has the cure; root needs none",
        )
    return VmmDied(f"QEMU ended at once: {said}", hint="`coppice doctor` checks what it needs")


def _unprivileged_user(instance_id: str) -> int | None:
    """A user id of its own for each VMM, so that one cannot signal or trace another; None where this process is not root already.

    Nothing belongs to these users: they own no file.

    :raises HostCannot: this process could not tell such a VMM from a dead one
    """
    if os.geteuid() != 0:
        return None
    if not processes.may_trace_any():
        raise HostCannot(
            "root has no CAP_SYS_PTRACE here, and could not look into a VMM that has given up root",
            hint="give it to the container: `docker run --cap-add SYS_PTRACE`",
        )
    mapped = sum(int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines())
    if mapped < 1 << 31:  # root of a user namespace with few ids
        return _NOBODY
    return _FIRST_USER + int.from_bytes(hashlib.sha256(instance_id.encode()).digest()[:3])


@contextlib.contextmanager
def _listening_sockets(directory: Path) -> Iterator[dict[str, int]]:
    """Listening sockets for QEMU to inherit: they exist before it starts, so nobody has to poll for them."""
    names = [command.QMP_SOCKET, *(files.PORT_SOCKET.format(port) for port in range(files.PORTS))]
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    sockets: dict[str, socket.socket] = {}
    try:
        for name in names:
            (directory / name).unlink(missing_ok=True)
            sockets[name] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sockets[name].bind(f"/proc/self/fd/{descriptor}/{name}")
            sockets[name].listen(1)
        yield {name: listener.fileno() for name, listener in sockets.items()}
    finally:
        for listener in sockets.values():
            listener.close()
        os.close(descriptor)


def _exit_reason(log: Path, status: int | None) -> str:
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _LOG_TAIL))
            text = stream.read().decode(errors="replace")
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    said = re.sub(r"^qemu-system-\w+: ", "", lines[-1]) if lines else ""
    if status is not None and status < 0:
        said = f"signal {-status}" + (f", last words: {said}" if said else "")
    return said or ("exit status unknown" if status is None else f"exit status {status}")
