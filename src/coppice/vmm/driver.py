"""The contract between Coppice and a VMM.

A driver runs one VMM process for each instance. The process works in the instance's directory. Its
configuration has **relative paths only**, so that its captures can be restored in any directory.

These rules hold for every method:

* A driver touches no file outside the instance's directory.
* A driver keeps no state between calls, because another process may make the next call.
* The caller places all files before `boot` or `restore`, and removes them after the process ended.
* The caller holds the instance's lock, so that no two calls work on the same machine. `dial`,
  `alive`, `is_paused` and `wait_exit` need no lock.
* `boot` or `restore` that raises leaves no VMM process behind. Any other call that raises leaves
  the process and the guest as they are, unless it raises `VmmDied`; the caller decides what to do.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coppice.errors import NotSupported
from coppice.model import MachineSpec, Manifest, Record, VmmProcess
from coppice.model.network import Nic, NicBackend

if TYPE_CHECKING:
    from coppice.linux.remap import Layer

# Files of an instance's directory that a driver knows by name. Disks are named by `Launch`.
LIVE_MEMORY: Final = "memory.live"  # guest RAM of a first boot, if the driver boots in a file: the guest writes to it
MEMORY: Final = "memory"  # the captured mem-file: mode 0444, never changes
MEMORY_NEW: Final = "memory.new"  # guest RAM, while a capture writes it
VMSTATE: Final = "vmstate"  # device state, without RAM
VMSTATE_NEW: Final = "vmstate.new"  # device state, while a capture writes it
KERNEL: Final = "vmlinuz"
INITRD: Final = "initrd"
CONSOLE_LOG: Final = "console.log"
VMM_LOG: Final = "vmm.log"
PORTS: Final = 8  # agent ports: one for control, the others for sessions
# Of the command line of each guest's kernel. quiet: each line on an emulated serial port costs
# milliseconds. panic=-1: a panic ends the VMM. cryptomgr.notests saves 0.25 s under emulation.
# rcupdate.rcu_expedited: to freeze a disk, set up a network card or unmount, a kernel waits for
# grace periods, 10 ms each on one that preempts tasks, and a fraction of a millisecond with this.
KERNEL_WORDS: Final = (
    "console=ttyS0",
    "quiet",
    "panic=-1",
    "random.trust_cpu=on",
    "cryptomgr.notests",
    "rcupdate.rcu_expedited=1",
)

# File names of a machine's disks. No driver knows these names.
ROOT_DISK: Final = "root.img"
OVERLAY: Final = "overlay"  # the serial of the overlay disk, which every machine has
VOLUME: Final = "volume{}"  # the serial of a volume, by its index in the machine
RAW: Final = ".raw"  # a writable disk or volume is the file SERIAL.raw, and layers over it: SERIAL.1...
OVERLAY_DISK: Final = OVERLAY + RAW
VOLUME_DISK: Final = VOLUME + RAW


_TABLES: Final = 16 << 20


class AgentDevice(StrEnum):
    """The virtual device that carries the agent's ports, by the kernel module that drives it."""

    SERIAL = "virtio_console"
    VSOCK = "vmw_vsock_virtio_transport"


class Capabilities(Record, frozen=True, kw_only=True):
    """What a driver can do. Callers read these, and never a driver's name."""

    maps_mem_file_privately: bool  # a restore maps MEMORY with MAP_PRIVATE, so a hard link may be shared
    maps_layers: bool  # a restore maps Launch.layers over MEMORY before anything reads the guest's memory
    observable: bool  # its main thread may call userfaultfd, and no device writes to pinned guest memory
    boots_in_file: bool  # on first boot guest RAM is the file LIVE_MEMORY, so a capture writes no RAM
    restores_paused: bool  # a restore can load the state and leave the guest stopped
    nic_backends: frozenset[NicBackend]  # the backends that it can connect a NIC to
    agent_device: AgentDevice = AgentDevice.SERIAL
    enters_by_pvh: bool = False  # an ELF kernel must have a PVH entry point
    state_names_files: bool = False  # VMSTATE has paths of files that a restore opens
    layer_format: str = ""  # of the layers that a disk may consist of; "" if each disk must be one raw file
    switches_layers: bool = False  # a running machine can go on in new layers of its disks


class Saved(StrEnum):
    """Where the RAM of a paused machine is after `save`."""

    IN_FILE = "in its file"  # LIVE_MEMORY, which the VMM maps shared: complete, and still mapped
    IN_PROCESS = "in the process"  # private pages of the VMM over MEMORY and its layers: the caller must collect them
    WRITTEN = "written"  # the VMM has written all of it to MEMORY_NEW


class Disk(Record, frozen=True, kw_only=True):
    """One disk of a machine. The guest knows it by its serial number."""

    path: str  # relative to the instance's directory
    serial: str
    readonly: bool
    size_bytes: int
    below: tuple[str, ...] = ()  # the files that `path` is a layer over, from the raw one on; only read

    @property
    def largest_bytes(self) -> int:
        """The most bytes that its file may have. A writable disk may consist of layers, or get one while
        the machine runs: a layer has tables too, and free parts between used ones.
        """
        return self.size_bytes + (0 if self.readonly else self.size_bytes // 4 + _TABLES)


def unrecorded(_: VmmProcess) -> None:
    """Leave a process without a record: its working directory alone identifies it."""


class Launch(Record, frozen=True, kw_only=True):
    """The parameters of one run of one instance.

    A restored machine has the saved machine's devices, in the same order, with the directory, disk
    files and network of this record.
    """

    directory: Path
    machine: MachineSpec
    disks: tuple[Disk, ...]  # in the order of their devices
    nics: tuple[Nic, ...] = ()  # their number and order are part of VMSTATE
    manifest: Manifest
    layers: tuple[Layer, ...] = ()  # for a restore: mapped over MEMORY; see `Capabilities.maps_layers`
    user: int | None = None  # the user id that the VMM drops root to; unique in the data directory
    cgroup: Path | None = None  # the control group that the VMM starts in
    record: Callable[[VmmProcess], None] = unrecorded  # called once the process runs, in the thread that started it


class VmmDriver(ABC):
    """One kind of VMM."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name stored in records and manifests."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this driver can do on this host."""

    @abstractmethod
    def vmm_bytes(self, machine: MachineSpec) -> int:
        """Return the most memory that the VMM of such a machine takes for itself, besides the guest's RAM.

        It is counted for the budget of memory.

        :raises HostCannot: this host lacks the requested accelerator
        """

    @abstractmethod
    async def manifest(self, machine: MachineSpec) -> Manifest:
        """Return what a host needs to restore a capture of this machine made now on this host.

        :raises MissingTool: the VMM is not installed
        :raises HostCannot: this host lacks the requested accelerator
        """

    def loses_connections(self, manifest: Manifest) -> bool:  # noqa: ARG002 - for drivers that do
        """Return whether a connection that is made right after a restore may break, or never be
        answered.
        """
        return False

    @abstractmethod
    async def boot(self, launch: Launch) -> VmmProcess:
        """Start a machine from KERNEL, INITRD and its disks.

        Prerequisites: the directory has KERNEL, INITRD and all disks, and no VMM works in it. The
        driver replaces stale sockets.
        On success the VMM process runs, and the guest may still be booting.
        On failure there is no process.

        :raises VmmDied: the VMM ended at once; the message has the end of its log
        """

    @abstractmethod
    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        """Start a machine from MEMORY and VMSTATE.

        Prerequisites: as for `boot`, and the directory has MEMORY, its layers and VMSTATE of one
        capture, whose manifest equals `launch.manifest`. KERNEL and INITRD may be stubs. `paused`
        needs the capability `restores_paused`, and layers need `maps_layers`. On success the VMM
        process runs. The guest runs as soon as the state is loaded, or with `paused` when it is
        resumed. When the VMM answers (see `is_paused`), it has mapped MEMORY and the layers, and no
        longer needs their names. If the state cannot be
        loaded, the only sign may be that the process ends: a caller that waits for the guest must
        wait for `wait_exit` too. On failure there is no process, and MEMORY and VMSTATE are
        unchanged.

        :raises VmmDied: the VMM ended at once; the message has the end of its log
        :raises HostCannot: the VMM cannot be traced here, so that no layers can be mapped
        """

    def make_layer(self, path: Path, size_bytes: int) -> None:  # noqa: ARG002
        """Make an empty layer of a disk at a new path. Blocks.

        Prerequisite: the capability `layer_format`, as for `merge_layers` and `flatten_disk`. No
        layer has the path of a file below it: the callers of these methods give the chain.

        :raises NoSpace: the disk is full
        :raises HostCannot: it cannot be made on this host
        """
        raise _raw_only(self.name)

    def merge_layers(self, base: Path, merged: Path, above: Sequence[Path]) -> None:  # noqa: ARG002
        """Write the content of the layers `above` into the layer `merged` below them. Blocks.

        Prerequisite: nothing uses `merged`. On success `merged` over `base` is the same disk. `base` and
        `above` are only read. On failure `merged` is useless.

        :raises NoSpace: the disk is full
        :raises HostCannot: a layer is damaged, or this host cannot do it
        """
        raise _raw_only(self.name)

    def flatten_disk(self, base: Path, layers: Sequence[Path], out: Path) -> None:  # noqa: ARG002
        """Write a disk that consists of layers as one raw file to a new path. Blocks.

        `base` and `layers` are only read. On failure the caller removes `out`.

        :raises NoSpace: the disk is full
        :raises HostCannot: a layer is damaged, or this host cannot do it
        """
        raise _raw_only(self.name)

    async def disks_in_use(self, directory: Path) -> tuple[tuple[str, ...], ...]:  # noqa: ARG002
        """Return, for each disk that a VMM uses, the names of its files, from the raw one on. The VMM
        writes to the last one alone, if to any. Changes nothing.

        Prerequisites: the capability `switches_layers`, as for the methods below up to `replace_below`,
        and a VMM runs in the directory.

        :raises VmmDied: there is no VMM
        :raises VmmError: its answer is not understood
        """
        raise _raw_only(self.name)

    async def prepare_switch(self, directory: Path, disk: Sequence[str]) -> None:  # noqa: ARG002
        """Let a VMM open a new layer of one of its machine's disks, which it does not use yet.

        `disk` has the names of all files of the disk, from the raw one on. The last one is the new
        layer. Prerequisites: a VMM runs, whose machine may run and writes to the last file but one, and
        the new layer is empty. Idempotent. The disk is the same on success and on failure.

        :raises VmmDied: there is no VMM
        :raises VmmError: the VMM refused, or writes to another file
        :raises VmmTimeout: the VMM did not answer
        """
        raise _raw_only(self.name)

    async def switch_layers(self, directory: Path, disks: Sequence[Sequence[str]]) -> None:  # noqa: ARG002
        """Let a machine write to a new layer of each of these disks from now on: of all, or of none.

        Prerequisites: the machine is paused, and `prepare_switch` succeeded with the names of each disk. On
        success the machine writes to the new layers. After a failure the VMM knows to which files it
        writes: see `disks_in_use`. A disk has the same content in both cases, with and without the new layer.

        :raises VmmDied: there is no VMM
        :raises VmmError: the VMM refused
        :raises VmmTimeout: the VMM did not answer
        """
        raise _raw_only(self.name)

    async def finish_switch(self, directory: Path, disk: Sequence[str]) -> None:  # noqa: ARG002
        """Take the files below the topmost layer of a disk from a VMM: it has none of them open for writing on success.

        Prerequisites: a VMM runs, whose machine may run and writes to the last file of `disk`.
        Idempotent. On failure the VMM may still have one open for writing, but the machine does not write to it.

        :raises VmmDied: there is no VMM
        :raises VmmError: the VMM refused
        :raises VmmTimeout: the VMM did not answer
        """
        raise _raw_only(self.name)

    async def replace_below(self, directory: Path, disk: Sequence[str]) -> None:  # noqa: ARG002
        """Let a machine use one layer of a disk in place of all that are below the one that it writes to.

        `disk` has the names of the raw file, of that layer, and of the one that it writes to.
        Prerequisites: a VMM runs, whose machine may run, and the disk is the same with that layer. On
        success the VMM uses these three files alone. On failure it may use the others: see `disks_in_use`.

        :raises VmmDied: there is no VMM
        :raises VmmError: the VMM refused
        :raises VmmTimeout: the VMM did not answer
        """
        raise _raw_only(self.name)

    def check_layer(self, path: Path, size_bytes: int) -> None:  # noqa: ARG002
        """Refuse a layer from another host that would make the VMM open other files than its own. Blocks.

        Prerequisite: the capability `layer_format`. Changes nothing.

        :param size_bytes: of the disk
        :raises IntegrityError: it would, or is no layer of such a disk
        """
        raise _raw_only(self.name)

    @abstractmethod
    async def dial(self, directory: Path, port: int) -> socket.socket:
        """Connect to an agent port (0 to PORTS - 1) of a machine; return a non-blocking stream
        socket.

        Prerequisites: none. The machine may be starting, paused or gone.
        On success the caller owns the socket. The guest may not have read anything yet.
        On failure nothing is left open. A caller tries again until its own deadline.

        :raises OSError: nothing listens: ConnectionError, FileNotFoundError, BlockingIOError or
            TimeoutError
        """

    @abstractmethod
    async def pause(self, directory: Path) -> None:
        """Stop the vCPUs and drain the disks. Idempotent.

        Prerequisites: a VMM runs in the directory. On success no vCPU runs, and all disk writes of
        the guest are in the disk files (not yet synced). On failure the machine may run or be
        paused: the caller resumes it.

        :raises VmmDied: there is no VMM
        :raises VmmError: the VMM refused
        :raises VmmTimeout: the VMM did not answer
        """

    @abstractmethod
    async def resume(self, directory: Path) -> None:
        """Let a paused machine run. Idempotent.

        Prerequisites: a VMM runs in the directory; it may have been saved or restored with
        `paused`. On success the vCPUs run. On failure the machine may still be paused.

        :raises VmmDied: there is no VMM
        :raises VmmError: the VMM refused
        :raises VmmTimeout: the VMM did not answer
        """

    @abstractmethod
    async def save(self, directory: Path) -> Saved:
        """Write the device state to VMSTATE_NEW; return where the RAM of the same instant is.

        Prerequisites: the machine is paused. Neither VMSTATE_NEW nor MEMORY_NEW is in use; existing
        ones are replaced. On success VMSTATE_NEW is complete, and MEMORY_NEW too if the result is
        `WRITTEN`; neither is synced. The machine stays paused and can be resumed. While it is
        paused, its RAM does not change. On failure the machine stays paused and can be resumed. The
        caller removes VMSTATE_NEW and MEMORY_NEW.

        MEMORY, VMSTATE and any file with other links are never written to.

        :raises NoSpace: the disk is full
        :raises VmmDied: there is no VMM
        :raises VmmError: the VMM refused
        :raises VmmTimeout: the VMM did not answer
        """

    @abstractmethod
    async def is_paused(self, directory: Path) -> bool:
        """Return whether the vCPUs are stopped. Changes nothing.

        :raises VmmDied: no VMM answers
        """

    @abstractmethod
    async def quit(self, directory: Path, process: VmmProcess) -> None:
        """End the VMM at once, without the guest's help. Idempotent.

        Prerequisites: none. The process may be gone; a recycled pid is left alone. On success the
        process is gone, and the caller may change or remove any file of the directory. On failure
        the process may run.

        :raises VmmTimeout: the kernel did not end it in time
        """

    @abstractmethod
    async def wait_exit(self, directory: Path, process: VmmProcess) -> str:
        """Wait for the end of the VMM process; return the reason, one line. Changes nothing."""

    @abstractmethod
    def alive(self, process: VmmProcess) -> bool:
        """Return whether exactly this process runs: pid, start time and executable must match.

        :raises HostCannot: the kernel hides the process's executable from this user
        """

    @abstractmethod
    def find_orphans(self, instances: Path) -> dict[Path, list[VmmProcess]]:
        """Return this driver's VMM processes whose working directory is directly below `instances`,
        by directory.

        Includes launchers that are about to become a VMM. Blocks.
        """


def _raw_only(name: str) -> NotSupported:
    return NotSupported(f"{name} has no disk layers", hint="use another VMM: see `coppice run --help`")
