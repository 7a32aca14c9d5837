"""Instances: one record for each virtual machine."""

from enum import StrEnum

from coppice.model.capture import Capture, Manifest, MemFile
from coppice.model.record import MIB, Record
from coppice.model.specs import Egress, Limits, MachineSpec, ProcessSpec, Publish
from coppice.model.supervision import Ending, HealthCheck, Observed, RestartPolicy, Supervision


class State(StrEnum):
    """State of an instance. The CLI, the API and the records use the same words."""

    CREATED = "Created"  # recorded; its directory is being made
    INITIALIZING = "Initializing"  # the VMM runs; the guest has not yet acknowledged its identity
    RUNNING = "Running"  # the guest has acknowledged its identity
    PAUSED = "Paused"  # the VMM runs, but resuming the guest failed
    SHUTDOWN = "Shutdown"  # the guest was asked to power off
    STOPPED = "Stopped"  # no VMM; only the disk remains
    STANDBY = "Standby"  # no VMM; memory and disk are captured
    TEMPLATE = "Template"  # as Standby, but it can only be forked
    UNKNOWN = "Unknown"  # shown in a list if the true state cannot be determined; never recorded


class VmmProcess(Record, frozen=True, kw_only=True):
    """A VMM process, identified so that a recycled pid is not mistaken for it."""

    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat
    executable: str


class ProcessEnd(Record, frozen=True, kw_only=True):
    """How a machine's process ended, as its guest says."""

    exit_code: int  # 128+n if signal n ended it
    signal: int | None = None  # None: it exited
    at: float  # the guest's clock


def said(end: ProcessEnd) -> str:
    """Return how a process ended, in words."""
    return f"exited with status {end.exit_code}" if end.signal is None else f"was ended by signal {end.signal}"


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
    egress: Egress = Egress()  # of a network that can enforce it
    limits: Limits = Limits()  # of its VMM
    parent: str | None = None  # id of the instance it was forked from
    parent_name: str | None = None  # for display: the parent may have been removed
    snapshot: str | None = None  # id of the snapshot that it was forked from, or restored to
    capture: Capture | None = None  # its memory at rest; while it runs, the memory that it was restored from
    disk_layers: dict[str, tuple[int, ...]] = {}  # by the serial of a disk: the layers over its raw file, lowest first
    manifest: Manifest | None = None  # of the host and VMM at its last start
    vmm: VmmProcess | None = None
    vmm_bytes: int = 32 * MIB  # that its VMM may take besides the guest's RAM
    vmm_user: int | None = None  # user id of its VMM if root starts it; unique in the data directory
    started_at: float | None = None
    console_from: int = 0  # size of its console's log when its present run began
    exit_reason: str | None = None
    ending: Ending | None = None  # of its last run; None: it has not run, or runs
    process_end: ProcessEnd | None = None  # of its last run; None: it runs, it has none, or nobody has looked since
    identity_serial: int = 0  # of the latest acknowledged identity message
    identified: bool = False  # whether it has its own machine-id, boot-id and host keys
    stem_of: str | None = None  # name of the machine that an operation captured in it; such a stem is internal
    owner: str | None = None  # None: the operator's
    public: bool = False  # whether other owners may fork it while it is a Template
    supervision: Supervision | None = None  # its policies; None: it has none
    observed: Observed | None = None  # by the supervisor; only in what `get`, `ls` and `inspect` return

    @property
    def mem_file(self) -> MemFile | None:
        """The mem-file of its capture."""
        return self.capture.mem_file if self.capture else None

    @property
    def expires_at(self) -> float | None:
        """The end of its lifetime; None: it has no end."""
        return self.supervision.expires_at if self.supervision else None

    @property
    def restart(self) -> RestartPolicy:
        """When it is started again after it ended by itself."""
        return self.supervision.restart if self.supervision else RestartPolicy()

    @property
    def health_check(self) -> HealthCheck | None:
        """How the health of its service is checked; None: it is not."""
        check = self.supervision.health_check if self.supervision else None
        return None if check is None or check.kind == "none" else check

    @property
    def shared_random(self) -> tuple[str, ...]:
        """The processes in its captured memory whose random generators all its forks share."""
        return self.capture.shared_random if self.capture else ()
