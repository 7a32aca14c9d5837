"""Reports of operations: timings, sizes, outcomes."""

from typing import Literal

from coppice.model.capture import Sharing
from coppice.model.instance import Instance
from coppice.model.record import Record
from coppice.model.specs import Egress


class Usage(Record, frozen=True, kw_only=True):
    """What a VMM with limits uses, as its control group counts it; 0 if nothing counts it."""

    memory_bytes: int
    cpu_s: float  # since the start of the VMM
    tasks: int
    oom_kills: int


class Traffic(Record, frozen=True, kw_only=True):
    """Bytes that crossed the NIC of a Running instance, in the directions of its guest.

    `host`: the host counted them, since the start of the present VMM. `guest`: the guest's kernel did,
    since its first boot, so a fork's counts begin with those of its source; a guest can claim any number.
    """

    received_bytes: int
    sent_bytes: int
    counted_by: Literal["host", "guest"]


class MemoryReport(Record, frozen=True, kw_only=True):
    """Guest RAM of one instance, in bytes, as the kernel accounts it."""

    mapped_bytes: int  # size of the guest RAM
    shared_bytes: int  # resident pages of the mem-file and its layers
    unique_bytes: int  # pages of this instance alone: anonymous plus swapped, or its own file's blocks
    vmm_overhead_bytes: int  # anonymous memory of the VMM process outside guest RAM, swapped or not
    inode: int | None
    link_count: int
    layers: int = 0  # over the mem-file
    sharing: Sharing | None
    usage: Usage | None = None  # of a running instance with limits
    traffic: Traffic | None = None  # in the result of `stats`, of a Running instance; None: nothing counts it


class CaptureReport(Record, frozen=True, kw_only=True):
    """The cost of one capture."""

    pause_ms: float  # how long the guest did not run
    total_ms: float
    ram_bytes_written: int
    dirty_bytes: int  # private pages found, for a guest on a private mapping
    stages: dict[str, float] = {}


class ForkResult(Record, frozen=True, kw_only=True):
    """One child of a fan-out: an instance, or the error that prevented it."""

    name: str
    ok: bool
    instance: Instance | None = None
    error: str | None = None
    error_code: str | None = None
    started_ahead: bool = False  # its VMM was started before the request
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
    source_pause_ms: float | None = None  # how long a running source was paused
    capture: CaptureReport | None = None
    shared_random: tuple[str, ...] = ()  # processes whose random generators the forks share: "node (pid 212): openssl"

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The children that succeeded."""
        return tuple(result.instance for result in self.results if result.instance is not None)


class ExecResult(Record, frozen=True, kw_only=True):
    """A finished command. `exit_code` is 128+n if signal n ended it, as in a shell."""

    exit_code: int
    stdout: bytes = b""
    stderr: bytes = b""
    duration_ms: float = 0.0


class FileStat(Record, frozen=True, kw_only=True):
    """The status of a path in the guest. `kind` is the type letter of `find -type`."""

    path: str
    kind: Literal["f", "d", "l", "c", "b", "p", "s"]
    size_bytes: int
    mode: int
    uid: int
    gid: int
    mtime: float
    link_target: str | None = None


FileEventKind = Literal[
    "watching", "created", "modified", "closed", "attributes", "moved_from", "moved_to", "deleted", "overflow", "gone"
]


class FileEvent(Record, frozen=True, kw_only=True):
    """A change of a watched path of the guest.

    `watching` comes first: all later changes are reported. `created`, `deleted` and `moved_from` and
    `moved_to` (with the same `cookie`) are about names; `modified`, `closed` (by a writer) and
    `attributes` about files. `overflow`: the guest's kernel has dropped events, so look again. `gone`:
    the watched path itself is no longer there, and this is the last event.
    """

    kind: FileEventKind
    path: str
    is_directory: bool = False
    cookie: int = 0  # joins the two events of a move; 0: none


def as_utf8(text: str) -> str:
    """Return a path for JSON and terminals: bytes that are not UTF-8 are replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class TreeNode(Record, frozen=True, kw_only=True):
    """One instance in the lineage, with its memory. Its forks follow it in the list, one level
    deeper.

    The nodes form a list, not nested records: a lineage may be thousands of generations deep, and
    JSON parsers limit nesting.
    """

    instance: Instance
    depth: int  # 0: a root
    fork_count: int
    memory: MemoryReport | None


class Budgets(Record, frozen=True, kw_only=True):
    """The limits of a data directory. An operation that would exceed one is refused."""

    max_instances: int  # in any state
    memory_bytes: int  # for all running: each counts its RAM / memory_overcommit, plus 32 MiB for its VMM
    memory_overcommit: float  # 1: no sharing is assumed
    disk_floor_bytes: int  # space that stays free on the file system


class BudgetUse(Record, frozen=True, kw_only=True):
    """The budgets, and their use."""

    instances: int
    max_instances: int
    running: int
    memory_bytes: int  # of all running instances, counted as for the budget
    measured_bytes: int | None = None  # that they and their VMMs have of their own at this moment; None: not measured
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


class EgressRefusal(Record, frozen=True, kw_only=True):
    """A destination or name that a guest requested and was refused."""

    what: str  # "192.0.2.7:443/tcp", or a name
    count: int  # packets, or questions


class EgressReport(Record, frozen=True, kw_only=True):
    """The egress policy of a guest, and the counts of its passed and refused packets."""

    policy: Egress
    passed_packets: int = 0  # counted since its VMM was started
    refused_packets: int = 0
    refused: tuple[EgressRefusal, ...] = ()  # of the last hour, most frequent first


class GcReport(Record, frozen=True, kw_only=True):
    """The removed leftovers, which belonged to no record."""

    removed: tuple[str, ...] = ()
    bytes_freed: int = 0
    dry_run: bool = False


class Difference(Record, frozen=True, kw_only=True):
    """One captured file that has changed since its capture."""

    holder: Literal["instance", "snapshot", "volume"]
    id: str
    name: str
    file: str
    detail: str


class VerifyReport(Record, frozen=True, kw_only=True):
    """The result of `coppice verify`."""

    mem_files: int = 0  # and their layers; each file counts once, however many instances link to it
    disks: int = 0
    bytes_hashed: int = 0
    recorded: int = 0  # SHA-256 sums recorded for the first time
    skipped: tuple[str, ...] = ()  # instances and volumes whose disks are in use and cannot be checked
    no_space: tuple[str, ...] = ()  # others, of whose disks the free space allowed no temporary copy
    differences: tuple[Difference, ...] = ()
