"""Plain typed data: stored records and reports. No behaviour beyond arithmetic.

Names contain the units: `_bytes`, `_ms`, `_s`. Times of day are seconds since the epoch, UTC.
msgspec turns each type into JSON; with `--json` a command prints the type that it shows.
"""

from coppice.model.capture import (
    Capture as Capture,
    Manifest as Manifest,
    MemFile as MemFile,
    MemLayer as MemLayer,
    Sharing as Sharing,
)
from coppice.model.images import Image as Image, ImageConfig as ImageConfig
from coppice.model.instance import (
    Instance as Instance,
    ProcessEnd as ProcessEnd,
    State as State,
    VmmProcess as VmmProcess,
)
from coppice.model.progress import Progress as Progress, ProgressSink as ProgressSink, no_progress as no_progress
from coppice.model.record import (
    GIB as GIB,
    MIB as MIB,
    PAGE_SIZE as PAGE_SIZE,
    Record as Record,
    from_json as from_json,
    to_builtins as to_builtins,
    to_json as to_json,
)
from coppice.model.reports import (
    Budgets as Budgets,
    BudgetUse as BudgetUse,
    CaptureReport as CaptureReport,
    Check as Check,
    Difference as Difference,
    EgressRefusal as EgressRefusal,
    EgressReport as EgressReport,
    ExecResult as ExecResult,
    FileEvent as FileEvent,
    FileEventKind as FileEventKind,
    FileStat as FileStat,
    ForkReport as ForkReport,
    ForkResult as ForkResult,
    GcReport as GcReport,
    MemoryReport as MemoryReport,
    Traffic as Traffic,
    TreeNode as TreeNode,
    Usage as Usage,
    VerifyReport as VerifyReport,
    as_utf8 as as_utf8,
)
from coppice.model.snapshot import Snapshot as Snapshot, SnapshotKind as SnapshotKind
from coppice.model.specs import (
    ANY_PORT as ANY_PORT,
    OWN_ADDRESS as OWN_ADDRESS,
    Egress as Egress,
    Limits as Limits,
    MachineSpec as MachineSpec,
    ProcessSpec as ProcessSpec,
    Publish as Publish,
    VolumeDisk as VolumeDisk,
    VolumeMount as VolumeMount,
)
from coppice.model.supervision import (
    HealthCheck as HealthCheck,
    Observed as Observed,
    RestartPolicy as RestartPolicy,
    Supervision as Supervision,
)
from coppice.model.volumes import Attachment as Attachment, Volume as Volume
