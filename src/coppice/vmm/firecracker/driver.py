"""The Firecracker driver: needs KVM; starts and restores in milliseconds.

A first boot runs on anonymous memory. Its capture is a Full snapshot, for which Firecracker writes
all RAM. A restore maps the mem-file MAP_PRIVATE, with layers over it if there are any. Its capture
needs only the device state, because the caller collects the private pages. Firecracker has no
request for the device state alone, but it writes and syncs it before it opens the file for the RAM.
So that file is /dev/null, which it must refuse; the machine is unchanged. A Diff snapshot would
also work, but takes two to three times as long, and needs KVM's dirty log in each fork.

All paths are relative to the instance's directory, in which Firecracker runs, so no override is
needed for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import VmmDied, VmmError, VmmTimeout
from coppice.linux.files import os_errors
from coppice.linux.kvm import read_cpu
from coppice.linux.remap import lay_over_when_mapped
from coppice.model import MIB, MachineSpec, Manifest, Record, VmmProcess
from coppice.model.network import NicBackend
from coppice.names import check_accel
from coppice.vmm import confinement, layers, sockets, starting
from coppice.vmm import driver as files
from coppice.vmm import process as processes
from coppice.vmm import program as programs
from coppice.vmm.driver import AgentDevice, Capabilities, Launch, Saved, VmmDriver
from coppice.vmm.firecracker import api, config, host
from coppice.vmm.firecracker.api import Request
from coppice.vmm.firecracker.listening import Watch
from coppice.vmm.firecracker.metrics import METRICS, fatal
from coppice.vmm.starting import Rights

_LISTEN_S = 20.0
_OWN_BYTES = 16 * MIB  # of its heap and stacks
_LOAD_S = 60.0
_SAVE_S = 900.0  # a Full snapshot writes all RAM
_REFUSED_RAM_FILE = "memory backing file"  # in the refusal's message, in every supported release
_LINE = re.compile(r"\S+ \[[^\]]*?(?::(?P<level>[A-Z]+))?\] (?P<said>.*)")
_STARTED = "Running Firecracker v"
_REFUSAL = "Received Error. Status code"  # logged for a refused request, which is already reported to the caller


GroupsFor = Callable[[str, Iterable[str]], tuple[int, ...] | None]


class _Info(Record, frozen=True):
    """Firecracker's description of itself."""

    state: Literal["Not started", "Running", "Paused"]
    vmm_version: str


class FirecrackerDriver(VmmDriver):
    """Firecracker. `accel` is `auto` or `kvm`; `tcg` is refused when a machine is made."""

    def __init__(
        self,
        accel: str = "auto",
        *,
        program: Callable[[], str] = host.program,
        groups_for: GroupsFor = confinement.groups_for,
    ) -> None:
        """`program` finds the binary, and `groups_for` the groups that it needs.

        :raises UsageError: there is no such accelerator
        """
        self._wanted_accel = check_accel(accel)
        self._program = program
        self._groups_for = groups_for

    @property
    def name(self) -> str:
        return "firecracker"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            maps_mem_file_privately=True,
            maps_layers=layers.mappable(),
            observable=False,  # its seccomp filter ends it for a userfaultfd
            boots_in_file=False,
            restores_paused=True,
            nic_backends=frozenset({NicBackend.TAP}),
            agent_device=AgentDevice.VSOCK,
            state_names_files=True,
        )

    def vmm_bytes(self, machine: MachineSpec) -> int:  # noqa: ARG002 - the same for all
        return _OWN_BYTES

    async def manifest(self, machine: MachineSpec) -> Manifest:
        version = await host.version(self._program())
        host.require_release(version)
        host.require_kvm(self._wanted_accel)
        return Manifest(
            driver=self.name,
            vmm_version=version,
            machine="virtio-mmio",
            accel="kvm",
            cpu_model="host",
            cpu_flags=read_cpu().flags_digest,
            kernel=machine.kernel,
            memory_bytes=machine.memory_bytes,
            cpus=machine.cpus,
        )

    def loses_connections(self, manifest: Manifest) -> bool:
        return programs.release(manifest.vmm_version) < config.RESET_AWAITED

    async def boot(self, launch: Launch) -> VmmProcess:
        return await self._run(launch, config.boot(launch, host.require_release(launch.manifest.vmm_version)))

    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        release = host.require_release(launch.manifest.vmm_version)
        return await self._run(launch, config.restore(launch, release, paused=paused))

    async def _load(self, launch: Launch, process: VmmProcess, requests: list[Request]) -> None:
        """Make the requests of a restore. The layers are mapped within the last one: Firecracker reads and writes the guest's memory in it.

        At that time its main thread has no seccomp filter yet: a filter is installed at the end of the request.
        """
        *before, load = requests
        if before:
            await api.ask(launch.directory, *before)
        loop, watched = asyncio.get_running_loop(), asyncio.Event()

        def ready() -> None:
            loop.call_soon_threadsafe(watched.set)

        laying = asyncio.ensure_future(
            in_thread(
                lay_over_when_mapped,
                process.pid,
                launch.directory / files.MEMORY,
                launch.machine.memory_bytes,
                launch.layers,
                ready,
            )
        )
        watching = asyncio.ensure_future(watched.wait())
        try:
            await asyncio.wait({laying, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not laying.done():
                await api.ask(launch.directory, load, deadline_s=_LOAD_S)
        except BaseException:
            if laying.done() and (error := laying.exception()) is not None:  # it has ended the process, and knows why
                raise error from None
            await complete(processes.kill(process))  # which ends the tracing too
            await complete(asyncio.gather(laying, return_exceptions=True))
            raise
        finally:
            watching.cancel()
        await complete(laying)

    async def _run(self, launch: Launch, requests: list[Request]) -> VmmProcess:
        """Start a process and make the requests that start a machine in it.

        If one is refused, end the process.

        :raises VmmDied: it ended at once, or refused a request
        """
        process = await starting.start_in_thread(launch, start, self._program(), self._groups_for)
        try:
            if not self.alive(process):
                said = await self.wait_exit(launch.directory, process)
                raise VmmDied(f"Firecracker ended at once: {said}", hint="check this host with `coppice doctor`")
            if launch.layers:
                await self._load(launch, process, requests)
            else:
                await api.ask(launch.directory, *requests, deadline_s=_LOAD_S)
        except api.Fault as fault:  # a partly loaded or configured machine is useless
            await complete(processes.kill(process))
            raise VmmDied(fault.message, hint=fault.hint) from fault
        except BaseException as error:
            await complete(processes.kill(process))
            if isinstance(error, VmmDied):  # the connection does not show the reason
                raise VmmDied(
                    f"{error.message} ({await self.wait_exit(launch.directory, process)})", hint=error.hint
                ) from error
            raise
        return process

    async def dial(self, directory: Path, port: int) -> socket.socket:
        return await sockets.connect_vsock(directory, config.VSOCK_SOCKET, port)

    async def pause(self, directory: Path) -> None:
        await api.ask(directory, Request("PATCH", "/vm", {"state": "Paused"}))

    async def resume(self, directory: Path) -> None:
        info = await _info(directory)
        if info.state != "Paused":  # resuming a running machine would make its vsock device dead
            return
        *may_be_refused, last = config.resume(programs.release(info.vmm_version))
        for request in may_be_refused:
            with contextlib.suppress(api.Fault):
                await api.ask(directory, request)
        await api.ask(directory, last)

    async def save(self, directory: Path) -> Saved:
        with os_errors("remove an unfinished capture"):
            for name in (files.VMSTATE_NEW, files.MEMORY_NEW):
                (directory / name).unlink(missing_ok=True)
            # A first boot runs on anonymous memory; anything else on private pages over the mem-file.
            written = not (directory / files.MEMORY).exists()
            # The files are not Firecracker's own: it could change them after the capture.
            if (group := confinement.group_of(directory)) is not None:
                for name in (files.VMSTATE_NEW, *([files.MEMORY_NEW] if written else [])):
                    confinement.give(directory, name, group, os.O_CREAT | os.O_EXCL)
        request = config.device_state(files.VMSTATE_NEW, files.MEMORY_NEW if written else "/dev/null")
        try:
            await api.ask(directory, request, deadline_s=_SAVE_S)
        except api.Fault as fault:
            if written or _REFUSED_RAM_FILE not in fault.said:
                raise
            return Saved.IN_PROCESS
        if not written:
            raise VmmError(
                "Firecracker accepted /dev/null as its RAM file", hint="use a release that Coppice was tested with"
            )
        return Saved.WRITTEN

    async def is_paused(self, directory: Path) -> bool:
        return (await _info(directory)).state == "Paused"

    async def quit(self, directory: Path, process: VmmProcess) -> None:  # noqa: ARG002 - its sockets are replaced by the next start
        # The disks are raw files written through the page cache, so there is nothing to flush.
        await processes.kill(process)

    async def wait_exit(self, directory: Path, process: VmmProcess) -> str:
        status = await processes.wait_exit(process)
        return await asyncio.to_thread(exit_reason, directory / files.VMM_LOG, status, directory / METRICS)

    def alive(self, process: VmmProcess) -> bool:
        return processes.is_alive(process)

    def find_orphans(self, instances: Path) -> dict[Path, list[VmmProcess]]:
        return processes.by_working_directory(instances, [host.PROGRAM])


async def _info(directory: Path) -> _Info:
    said = await api.ask(directory, Request("GET", "/"))
    try:
        return msgspec.convert(said, _Info)
    except msgspec.ValidationError as error:
        raise VmmError(
            f"Firecracker's answer about itself was not understood: {error}", hint="see `coppice logs --vmm NAME`"
        ) from error


def _rights(program: str, launch: Launch, groups_for: GroupsFor) -> Rights:
    """Return Firecracker's rights, and let its own user work in the instance's directory. Blocks.

    Firecracker opens its files and devices after its start, so it starts as its own user. If a
    device is open to root alone, it stays root, without capabilities.
    """
    rights = confinement.rights(launch, program)
    user = confinement.own_user(launch.user)
    written = (files.VMM_LOG, METRICS)
    with os_errors("remove the metrics of the last run"):
        (launch.directory / METRICS).unlink(missing_ok=True)
    devices = (confinement.KVM, *([confinement.TUN] if launch.nics else []))
    groups = None if user in (None, confinement.NOBODY) else groups_for(program, devices)
    if user is None or groups is None:
        with os_errors("make the logs"):
            for name in written:
                (launch.directory / name).touch()
        return msgspec.structs.replace(rights, capabilities=None if user is None else 0)
    confinement.grant(launch, user, written)
    return msgspec.structs.replace(rights, user=user, groups=groups, capabilities=0)


def start(launch: Launch, program: str, groups_for: GroupsFor = confinement.groups_for) -> VmmProcess:
    """Start Firecracker and wait until it serves its API, or has ended. Blocks.

    :param groups_for: see `confinement.groups_for`

    :raises HostCannot: it cannot be started here
    :raises VmmTimeout: neither happened in time; the process is then ended
    """
    directory = launch.directory
    with contextlib.ExitStack() as stack:
        with os_errors(f"listen in {directory}"):
            for name in (api.SOCKET, config.VSOCK_SOCKET):  # Firecracker does not replace existing sockets
                (directory / name).unlink(missing_ok=True)
        watch = stack.enter_context(Watch(directory))
        arguments = ["--api-sock", api.SOCKET, "--log-path", files.VMM_LOG, "--level", "Info", "--show-level"]
        process = starting.spawn(
            [program, *arguments],
            cwd=directory,
            log=directory / files.CONSOLE_LOG,  # its standard output is the serial port
            pass_fds=stack.enter_context(layers.opened(launch)),
            rights=_rights(program, launch, groups_for),
        )
        try:
            if not watch.until_listening(api.SOCKET, process, _LISTEN_S) and processes.is_alive(process):
                raise VmmTimeout(
                    f"Firecracker did not serve its API within {_LISTEN_S:g} s",
                    hint="check whether the host is overloaded",
                )
        except BaseException:
            asyncio.run(processes.kill(process))
            raise
    return process


def exit_reason(log: Path, status: int | None, metrics: Path | None = None) -> str:
    """Return why Firecracker ended.

    Its status is 0 even after some errors, so the log takes precedence: the last error since the
    start. Fatal counters in its metrics are added.
    """
    counted = fatal(metrics) if metrics else ""

    def last_words(text: str) -> str:
        lines = [found for line in text.rpartition(_STARTED)[2].splitlines() if (found := _LINE.match(line))]
        errors = [found["said"] for found in lines if found["level"] == "ERROR" and _REFUSAL not in found["said"]]
        return "; ".join(filter(None, (errors[-1] if errors else "", counted and f"it counted {counted}")))

    return processes.exit_reason(log, status, last_words)
