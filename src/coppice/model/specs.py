"""The parts of a machine: hardware, volumes, published ports, process."""

from typing import Literal

from coppice.model.record import GIB, MIB, Record

OWN_ADDRESS = "own"
ANY_PORT = 0


class Publish(Record, frozen=True, kw_only=True):
    """One forwarded port: host side to guest side.

    When the instance is recorded, the address `own` is replaced by one that no other instance has.
    When its machine first starts, the port 0 is replaced by a free one. Both then stay the same.
    """

    host_port: int
    guest_port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    host_address: str = "127.0.0.1"


class Egress(Record, frozen=True, kw_only=True):
    """The destinations that a guest may reach. Replies of its published ports always pass."""

    mode: Literal["none", "all", "allow"] = "all"  # all: but this host, other instances, and link-local addresses
    networks: tuple[str, ...] = ()  # of `allow`: "192.0.2.0/24", "2001:db8::/32"
    names: tuple[str, ...] = ()  # of `allow`: "example.org", or "*.example.org" for the names below it


class Limits(Record, frozen=True, kw_only=True):
    """What the VMM of an instance may use of this host. None: no limit of its own."""

    memory_bytes: int | None = None  # RAM of the guest and of the VMM; more ends the VMM
    cpus: float | None = None  # CPU time per time
    pids: int | None = None  # threads of the VMM
    io_bytes_per_s: int | None = None  # reading, and as much writing, of the disk of the data directory


class VolumeMount(Record, frozen=True, kw_only=True):
    """A request to attach a volume to a machine."""

    volume: str  # name or id
    mount_path: str  # in the guest
    readonly: bool = False


class VolumeDisk(Record, frozen=True, kw_only=True):
    """A volume as one of a machine's disks."""

    volume_id: str
    volume_name: str
    size_bytes: int
    mount_path: str
    readonly: bool
    private: bool = False  # a clone of the volume, which belongs to this machine alone and is removed with it


class MachineSpec(Record, frozen=True, kw_only=True):
    """The virtual hardware. A fork has its source's: a vmstate loads only into the same."""

    cpus: int = 1
    memory_bytes: int = 512 * MIB
    overlay_bytes: int = 2 * GIB
    kernel: str = ""  # key of the kernel in the data directory
    acpi: bool = True  # whether the kernel finds its devices through ACPI, not on its command line
    volumes: tuple[VolumeDisk, ...] = ()  # in the order of their devices
    network: str = "user"  # name of its network provider, which decides its NIC


class ProcessSpec(Record, frozen=True, kw_only=True):
    """The image's process as this instance runs it."""

    argv: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = ""
    certificates: tuple[str, ...] = ()  # PEM; the agent adds them to the trusted ones at each boot
    notify: int | str | None = None  # port, or `unix:PATH`, at which a running process takes the notice of a fork
