"""Reports that combine records and measurements of one object."""

from coppice.model.instance import Instance
from coppice.model.record import Record
from coppice.model.reports import CaptureReport, MemoryReport
from coppice.model.snapshot import Snapshot
from coppice.model.volumes import Volume


class StandbyReport(Record, frozen=True, kw_only=True):
    """A captured instance, and the cost of its capture."""

    instance: Instance
    capture: CaptureReport


class Inspection(Record, frozen=True, kw_only=True):
    """Everything known about one instance."""

    instance: Instance
    fork_count: int
    forks: tuple[str, ...]
    directory: str
    disk_bytes: int  # allocated by its own overlay disk
    memory: MemoryReport | None


class SnapshotInspection(Record, frozen=True, kw_only=True):
    """Everything known about one snapshot. Sizes are allocated bytes."""

    snapshot: Snapshot
    source_lives: bool
    forks: tuple[str, ...]  # existing instances that were forked from it, or restored to it
    directory: str
    memory_bytes: int
    disk_bytes: int
    link_count: int  # holders of its mem-file; 0 if it has none


class VolumeInspection(Record, frozen=True, kw_only=True):
    """Everything known about one volume."""

    volume: Volume
    disk: str  # its file, without its layers
    disk_bytes: int  # allocated by the file and its layers
    link_count: int  # the file's names: its own, and one for each attachment and each disk that shares it
