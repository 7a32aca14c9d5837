"""Plain typed data: stored records and reports. No behaviour beyond arithmetic.

Names contain the units: `_bytes`, `_ms`, `_s`. Times of day are seconds since the epoch, UTC.
msgspec turns each type into JSON; with `--json` a command prints the type that it shows.
"""

from coppice.model.capture import Capture, Manifest, MemFile, MemLayer, Sharing
from coppice.model.images import Image, ImageConfig
from coppice.model.instance import Instance, ProcessEnd, State, VmmProcess
from coppice.model.progress import Progress, ProgressSink, no_progress
from coppice.model.record import GIB, MIB, PAGE_SIZE, Record, from_json, to_builtins, to_json
from coppice.model.reports import (
    Budgets,
    BudgetUse,
    CaptureReport,
    Check,
    Difference,
    EgressRefusal,
    EgressReport,
    ExecResult,
    FileEvent,
    FileEventKind,
    FileStat,
    ForkReport,
    ForkResult,
    GcReport,
    MemoryReport,
    Traffic,
    TreeNode,
    Usage,
    VerifyReport,
    as_utf8,
)
from coppice.model.snapshot import Snapshot, SnapshotKind
from coppice.model.specs import (
    ANY_PORT,
    OWN_ADDRESS,
    Egress,
    Limits,
    MachineSpec,
    ProcessSpec,
    Publish,
    VolumeDisk,
    VolumeMount,
)
from coppice.model.supervision import HealthCheck, Observed, RestartPolicy, Supervision
from coppice.model.volumes import Attachment, Volume

__all__ = [
    "ANY_PORT",
    "GIB",
    "MIB",
    "OWN_ADDRESS",
    "PAGE_SIZE",
    "Attachment",
    "BudgetUse",
    "Budgets",
    "Capture",
    "CaptureReport",
    "Check",
    "Difference",
    "Egress",
    "EgressRefusal",
    "EgressReport",
    "ExecResult",
    "FileEvent",
    "FileEventKind",
    "FileStat",
    "ForkReport",
    "ForkResult",
    "GcReport",
    "HealthCheck",
    "Image",
    "ImageConfig",
    "Instance",
    "Limits",
    "MachineSpec",
    "Manifest",
    "MemFile",
    "MemLayer",
    "MemoryReport",
    "Observed",
    "ProcessEnd",
    "ProcessSpec",
    "Progress",
    "ProgressSink",
    "Publish",
    "Record",
    "RestartPolicy",
    "Sharing",
    "Snapshot",
    "SnapshotKind",
    "State",
    "Supervision",
    "Traffic",
    "TreeNode",
    "Usage",
    "VerifyReport",
    "VmmProcess",
    "Volume",
    "VolumeDisk",
    "VolumeMount",
    "as_utf8",
    "from_json",
    "no_progress",
    "to_builtins",
    "to_json",
]
