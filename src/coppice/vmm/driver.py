"""The contract between Coppice and a VMM.

A driver runs one VMM process per instance, with the instance's directory as working directory and **only relative paths** in its
configuration, so that what it captures can be restored in any other directory. It never touches a file outside of that directory, it keeps
no state of its own between calls (another process may make the next call), and it leaves the directory to its caller: files are placed before
`boot` or `restore` and removed after the process has ended by the caller alone.

Who cleans up: a call that raises leaves no VMM process behind if it was the call that started it; any other call leaves the process as it is, and the
caller decides. `quit` is idempotent and always ends the process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

from coppice.model import MachineSpec, Manifest, Publish, Record, VmmProcess

# Files of an instance's directory that a driver knows. All else in the directory is the host's.
LIVE_MEMORY: Final = "memory.live"  # guest RAM of a first boot, still written by the guest
MEMORY: Final = "memory"  # the captured mem-file: 0444, never changes
VMSTATE: Final = "vmstate"  # device state, without RAM
VMSTATE_NEW: Final = "vmstate.new"  # being captured
ROOT_DISK: Final = "root.img"
OVERLAY_DISK: Final = "overlay.raw"
KERNEL: Final = "vmlinuz"
INITRD: Final = "initrd"
CONSOLE_LOG: Final = "console.log"
VMM_LOG: Final = "vmm.log"
VOLUME_DISK: Final = "volume{}.raw"  # by its place in the machine's volumes
PORT_SOCKET: Final = "port{}.sock"
PORTS: Final = 8  # agent ports: one for control, the others for sessions


class Capabilities(Record, frozen=True, kw_only=True):
    """What a driver can do; callers branch on these and never on a driver's name."""

    maps_mem_file_privately: bool  # restore maps MEMORY with MAP_PRIVATE, so a hard link may be shared
    boots_in_file: bool  # on first boot guest RAM is LIVE_MEMORY, so a capture writes no RAM
    restores_without_kernel: bool  # restore wants only stubs in place of kernel and initrd
    restores_paused: bool  # a restore can load the state and leave the guest stopped
    user_mode_network: bool
    relative_paths: bool  # nothing in VMSTATE names a directory


class Launch(Record, frozen=True, kw_only=True):
    """What a VMM needs to run one instance once. Paths inside of `directory` are the constants above."""

    directory: Path
    machine: MachineSpec
    mac: str
    publish: tuple[Publish, ...] = ()
    manifest: Manifest


class VmmDriver(ABC):
    """One kind of VMM."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name stored in records and manifests."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this driver can do here."""

    @abstractmethod
    async def manifest(self, machine: MachineSpec) -> Manifest:
        """Say what a capture of this machine, made here and now, could be restored on.

        :raises MissingTool: the VMM is not installed
        :raises HostCannot: an accelerator was asked for that this host lacks
        """

    @abstractmethod
    async def boot(self, launch: Launch) -> VmmProcess:
        """Start a machine from its kernel. Returns when the VMM process runs; the guest may still be booting.

        :raises VmmDied: the VMM ended at once; the message carries the end of its log
        """

    @abstractmethod
    async def restore(self, launch: Launch, *, paused: bool = False) -> VmmProcess:
        """Start a machine from MEMORY and VMSTATE; the guest runs as soon as the state is loaded, or with `paused` (see `restores_paused`) once it is resumed.

        As soon as the VMM answers (see `is_paused`), it has mapped MEMORY, and does not need its name any more.

        Returns when the VMM process runs. A state that cannot be loaded shows as the end of the process, which
        `wait_exit` reports: whoever waits for the guest's answer waits for that too.
        """

    @abstractmethod
    async def published(self, directory: Path, asked: tuple[Publish, ...]) -> tuple[Publish, ...]:
        """The ports that a machine was launched with, with the host port that was picked in place of each 0.

        :raises VmmDied: there is no VMM to ask
        :raises VmmError: its answer is not understood
        """

    @abstractmethod
    async def pause(self, directory: Path) -> None:
        """Stop the vCPUs and drain the disks. Pausing a paused machine does nothing."""

    @abstractmethod
    async def resume(self, directory: Path) -> None:
        """Let a paused machine run. Resuming a running machine does nothing."""

    @abstractmethod
    async def save_devices(self, directory: Path) -> None:
        """Write the device state of a paused machine to VMSTATE_NEW. The machine stays paused, and can be resumed.

        RAM is not written: with `boots_in_file` it is in LIVE_MEMORY, else the memory room collects it from the process.
        """

    @abstractmethod
    async def is_paused(self, directory: Path) -> bool:
        """Whether the vCPUs are stopped.

        :raises VmmDied: there is no VMM to ask
        """

    @abstractmethod
    async def quit(self, directory: Path, process: VmmProcess) -> None:
        """End the VMM at once, without the guest's help. Idempotent; returns when the process is gone."""

    @abstractmethod
    async def wait_exit(self, directory: Path, process: VmmProcess) -> str:
        """Wait until the VMM process has ended; return why, in one line, as far as its log tells."""

    @abstractmethod
    def alive(self, process: VmmProcess) -> bool:
        """Whether this very process runs: pid, start time and executable must match.

        :raises HostCannot: the kernel does not show it
        """

    @abstractmethod
    def find_orphans(self, instances: Path) -> dict[Path, list[VmmProcess]]:
        """VMM processes of this driver whose working directory is below `instances`, by that directory."""
