"""Plain typed data: what is stored, what is reported, what is asked for. No behaviour beyond arithmetic.

Units are in the names: `_bytes`, `_ms`, `_s`. Times of day are seconds since the epoch, UTC. Everything here turns into
JSON by msgspec; where a command shows one of these types, that is what `coppice --json` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, Literal

import msgspec

MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4096


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all data types: immutable, keyword-only; `msgspec.structs.replace` makes a changed copy."""


class State(StrEnum):
    """State of an instance; the words are the same on every surface."""

    CREATED = "Created"  # recorded; its directory is being made
    INITIALIZING = "Initializing"  # its VMM runs, and its guest has not yet acknowledged who it is
    RUNNING = "Running"  # its guest has answered, as itself
    PAUSED = "Paused"  # its VMM runs, and could not be told to let the guest run on
    SHUTDOWN = "Shutdown"  # asked to power off
    STOPPED = "Stopped"  # no VMM; what it has is its disk
    STANDBY = "Standby"  # no VMM; its memory and its disk are captured
    TEMPLATE = "Template"  # the same, and only to be forked
    UNKNOWN = "Unknown"  # for those who show instances; none is recorded so


class SnapshotKind(StrEnum):
    """What a snapshot holds."""

    STANDBY = "Standby"  # memory and disk of one instant
    STOPPED = "Stopped"  # the disk alone


class Sharing(StrEnum):
    """How an instance came by the mem-file it maps."""

    OWN = "own"  # it made the file itself: first boot, or its own capture
    HARDLINK = "hardlink"  # a link to the source's inode
    COPY = "copy"  # the file system or the driver could not link


class Progress(Record, frozen=True, kw_only=True):
    """One step of a long operation. `total` is None where the end is not known; both count in `unit`."""

    stage: str
    done: int = 0
    total: int | None = None
    unit: Literal["bytes", "items", "ms"] = "items"


ProgressSink = Callable[[Progress], None]
"""Called from the thread or task that does the work; must be quick and must not raise."""


def no_progress(_: Progress) -> None:
    """The sink for callers that do not want to know."""


class ImageConfig(Record, frozen=True, kw_only=True):
    """What an image says of the process it is made for (the OCI image config, reduced)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = ""
    labels: dict[str, str] = {}


class Image(Record, frozen=True, kw_only=True):
    """A read-only root file system, stored once by the digest of its file."""

    digest: str  # "sha256:<64 hex>" of the root file system file
    name: str  # the latest name given to it
    size_bytes: int
    filesystem: Literal["erofs", "squashfs"]
    config: ImageConfig
    source: str  # how it was made, for people
    created_at: float
    owner: str | None = None  # None: the operator's
    public: bool = False  # whether other owners may run it
    tags: dict[str, str] = {}


OWN_ADDRESS = "own"
ANY_PORT = 0


class Publish(Record, frozen=True, kw_only=True):
    """One forwarded port of the user-mode network: host side to guest side.

    The address `own` is replaced by a loopback address that no other instance has, the port 0 by a free one when the machine first starts. Both are kept then.
    """

    host_port: int
    guest_port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    host_address: str = "127.0.0.1"


class VolumeMount(Record, frozen=True, kw_only=True):
    """A volume that a machine is to have: asked for."""

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


class Attachment(Record, frozen=True, kw_only=True):
    """Who has a volume."""

    holder: Literal["instance", "snapshot"]
    instance_id: str  # or the snapshot's
    name: str
    mount_path: str
    readonly: bool


class Volume(Record, frozen=True, kw_only=True):
    """A named disk with an ext4 file system, which outlives the instances that it is attached to."""

    id: str
    name: str
    size_bytes: int
    created_at: float
    owner: str | None = None  # None: the operator's
    tags: dict[str, str] = {}
    attachments: tuple[Attachment, ...] = ()  # derived when it is read, never stored


class MachineSpec(Record, frozen=True, kw_only=True):
    """The virtual hardware. A fork's is its source's: a vmstate loads only into the machine it came from."""

    cpus: int = 1
    memory_bytes: int = 512 * MIB
    overlay_bytes: int = 2 * GIB
    kernel: str = ""  # key of the kernel in the data directory
    volumes: tuple[VolumeDisk, ...] = ()  # in the order of their devices


class ProcessSpec(Record, frozen=True, kw_only=True):
    """The image's process as this instance runs it."""

    argv: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = ""


class MemFile(Record, frozen=True, kw_only=True):
    """A captured mem-file as it was when it was frozen or linked, to be compared before each restore."""

    inode: int
    device: int
    size_bytes: int
    sharing: Sharing
    reason: str = ""  # why it is a copy, where it is one
    sha256: str | None = None


class VmmProcess(Record, frozen=True, kw_only=True):
    """A VMM process, named so that a recycled pid is not taken for it."""

    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat
    executable: str


class Manifest(Record, frozen=True, kw_only=True):
    """What a vmstate can be restored on: restored anywhere else it crashes or hangs."""

    driver: str
    vmm_version: str
    machine: str
    accel: str
    cpu_model: str
    cpu_flags: str  # digest of the host's CPU flags where the guest sees them, else ""
    kernel: str
    memory_bytes: int
    cpus: int
    tsc_khz: int = 0  # the guest's clock runs by it; 0 where the VMM scales it


class Instance(Record, frozen=True, kw_only=True):
    """One VM."""

    id: str
    name: str
    state: State
    created_at: float
    driver: str
    image: str  # digest
    image_name: str
    machine: MachineSpec
    process: ProcessSpec
    hostname: str
    tags: dict[str, str] = {}
    publish: tuple[Publish, ...] = ()
    parent: str | None = None  # id of the instance it was forked from
    parent_name: str | None = None  # kept for people: the parent may be gone
    snapshot: str | None = None  # id of the snapshot that it was forked from, or taken back to
    mem_file: MemFile | None = None
    manifest: Manifest | None = None
    vmm: VmmProcess | None = None
    started_at: float | None = None
    captured_at: float | None = None
    disk_stamp: str = ""  # the overlay disk as it was at the capture; memory and disk are of one instant or of no use
    open_ports: tuple[int, ...] = ()  # agent ports with a session at the capture: half open in what is restored
    frozen: bool = False  # the file system was frozen at the capture, and is to be thawed after the restore
    exit_reason: str | None = None
    identity_serial: int = 0  # of the latest identity message in its memory's history; the next is larger
    identified: bool = False  # whether it has been made a machine of its own: machine-id, boot-id, host keys
    owner: str | None = None  # None: the operator's
    public: bool = False  # whether other owners may fork it: a Template's


class Snapshot(Record, frozen=True, kw_only=True):
    """A named moment of an instance. It never changes, and needs neither its source nor its forks."""

    id: str
    name: str
    kind: SnapshotKind
    source: str  # id of the instance that it was made of
    source_name: str  # kept for people: the source may be gone
    created_at: float
    driver: str
    image: str  # digest
    image_name: str
    machine: MachineSpec
    process: ProcessSpec
    tags: dict[str, str] = {}
    mem_file: MemFile | None = None
    vmstate_sha256: str | None = None
    manifest: Manifest | None = None
    captured_at: float | None = None
    disk_stamp: str = ""
    disk_sha256: str | None = None
    size_bytes: int = 0  # allocated by its files, also where others have links to them
    pause_ms: float = 0.0  # a source that ran did not run for so long
    open_ports: tuple[int, ...] = ()
    frozen: bool = False
    identity_serial: int = 0
    identified: bool = False
    owner: str | None = None
    public: bool = False


class MemoryReport(Record, frozen=True, kw_only=True):
    """Guest RAM of one instance, in bytes, as the kernel accounts it."""

    mapped_bytes: int  # size of the guest RAM
    shared_bytes: int  # resident pages that are the mem-file's own
    unique_bytes: int  # pages that only this instance has: anonymous plus swapped, or its own file's blocks
    vmm_overhead_bytes: int  # anonymous memory of the VMM process outside of guest RAM, swapped or not
    inode: int | None
    link_count: int
    sharing: Sharing | None


class StageTimings(Record, frozen=True, kw_only=True):
    """Milliseconds spent in each stage of one operation, in order."""

    stages: dict[str, float] = {}

    @property
    def total_ms(self) -> float:
        """Sum of all stages."""
        return sum(self.stages.values())


class CaptureReport(Record, frozen=True, kw_only=True):
    """What one capture cost."""

    pause_ms: float  # the guest did not run for so long
    total_ms: float
    ram_bytes_written: int
    dirty_bytes: int  # private pages found, for a guest on a private mapping
    stages: dict[str, float] = {}


class ForkResult(Record, frozen=True, kw_only=True):
    """One child of a fan-out: an instance, or the error that kept it from becoming one."""

    name: str
    ok: bool
    instance: Instance | None = None
    error: str | None = None
    error_code: str | None = None
    started_ahead: bool = False  # its VMM had been started before it was asked for
    sharing: Sharing | None = None
    sharing_reason: str = ""
    memory: MemoryReport | None = None
    disk_bytes_written: int = 0
    stages: dict[str, float] = {}
    total_ms: float = 0.0


class ForkReport(Record, frozen=True, kw_only=True):
    """One fan-out."""

    source: str
    source_name: str
    count: int
    succeeded: int
    wall_ms: float
    results: tuple[ForkResult, ...]
    source_pause_ms: float | None = None  # of a source that ran, and runs on
    capture: CaptureReport | None = None

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The children that became instances."""
        return tuple(result.instance for result in self.results if result.instance is not None)


class ExecResult(Record, frozen=True, kw_only=True):
    """A finished command. `exit_code` is 128+n where signal n ended it, as a shell has it."""

    exit_code: int
    stdout: bytes = b""
    stderr: bytes = b""
    duration_ms: float = 0.0


class FileStat(Record, frozen=True, kw_only=True):
    """What the guest says of one path. `kind` is the type letter as `find -type` spells it."""

    path: str
    kind: Literal["f", "d", "l", "c", "b", "p", "s"]
    size_bytes: int
    mode: int
    uid: int
    gid: int
    mtime: float
    link_target: str | None = None


class TreeNode(Record, frozen=True, kw_only=True):
    """One instance in the lineage, with its memory and its children."""

    instance: Instance
    fork_count: int
    memory: MemoryReport | None
    children: tuple[TreeNode, ...] = ()


class Budgets(Record, frozen=True, kw_only=True):
    """How much of the host a data directory may take. What would go beyond is refused before it begins."""

    max_instances: int  # in any state
    memory_bytes: int  # for all that run: of each its RAM / memory_overcommit, and 32 MiB for its VMM
    memory_overcommit: float  # 1: no sharing is counted on
    disk_floor_bytes: int  # what is to stay free on the file system


class BudgetUse(Record, frozen=True, kw_only=True):
    """The budgets, and how much of them is in use."""

    instances: int
    max_instances: int
    running: int
    memory_bytes: int  # the worst case of all that run, as it is counted
    memory_limit_bytes: int
    memory_overcommit: float
    disk_free_bytes: int
    disk_floor_bytes: int


class Check(Record, frozen=True, kw_only=True):
    """One line of `coppice doctor`."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    cure: str = ""


class GcReport(Record, frozen=True, kw_only=True):
    """What nothing owned."""

    removed: tuple[str, ...] = ()
    bytes_freed: int = 0
    dry_run: bool = False


class Difference(Record, frozen=True, kw_only=True):
    """One captured file that is not what was captured."""

    holder: Literal["instance", "snapshot", "volume"]
    id: str
    name: str
    file: str
    detail: str


class VerifyReport(Record, frozen=True, kw_only=True):
    """What `coppice verify` looked at, and what it found."""

    mem_files: int = 0  # each file once, however many instances have a link to it
    disks: int = 0
    bytes_hashed: int = 0
    recorded: int = 0  # SHA-256 sums that were not known before
    skipped: tuple[str, ...] = ()  # instances and volumes whose disks are in use, so that they cannot be checked
    differences: tuple[Difference, ...] = ()


def to_json(value: object) -> bytes:
    """One JSON document; bytes become base64, enums their value."""
    return msgspec.json.encode(value)


def to_builtins(value: object) -> Any:
    """The same as dicts, lists and strings."""
    return msgspec.to_builtins(value)
