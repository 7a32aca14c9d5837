"""Snapshots: the named state of an instance at one instant."""

from enum import StrEnum

from coppice.model.capture import Capture, MemFile
from coppice.model.record import Record
from coppice.model.specs import Egress, Limits, MachineSpec, ProcessSpec


class SnapshotKind(StrEnum):
    """The contents of a snapshot."""

    STANDBY = "Standby"  # memory and disk of one instant
    STOPPED = "Stopped"  # the disk alone


class Snapshot(Record, frozen=True, kw_only=True):
    """The named state of an instance at one instant. It never changes, and outlives its source."""

    id: str
    name: str
    kind: SnapshotKind
    source: str  # id of the instance that it was made of
    source_name: str  # for display: the source may have been removed
    created_at: float
    driver: str
    image: str  # digest
    image_name: str
    machine: MachineSpec
    process: ProcessSpec
    tags: dict[str, str] = {}
    egress: Egress = Egress()  # of its source; a fork's, unless it is made with another one
    limits: Limits = Limits()  # of its source; a fork's, unless it is made with other limits
    capture: Capture | None = None  # None: it has the disk alone
    disk_layers: dict[str, tuple[int, ...]] = {}  # as those of an instance
    disk_stamp: str = ""  # of the content of its disks
    disk_sha256: str | None = None
    size_bytes: int = 0  # allocated by its files, including files shared by hard links
    pause_ms: float = 0.0  # how long a running source was paused
    identified: bool = False  # whether the disk has its source's own machine-id and host keys
    owner: str | None = None
    public: bool = False
    scheduled: bool = False  # made by the schedule of its source, which also removes it

    @property
    def mem_file(self) -> MemFile | None:
        """The mem-file of its capture."""
        return self.capture.mem_file if self.capture else None
