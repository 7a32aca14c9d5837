"""The operations of a host, each defined once: one request record per operation.

A request lists the operation's parameters with their types, defaults and descriptions. It also
names the type of the result. `tools/generate_client.py` generates the methods of the Python API,
their blocking twins and their documentation from these records. The JSON form and the JSON schema
come from msgspec. Every request is valid: its constructor raises UsageError or InvalidName for a
wrong type, or for a value that can never be accepted.

Each module is imported at the first use of one of its names: a command needs one or two of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.lazily import Names

if TYPE_CHECKING:
    from coppice.requests.archives import (
        ExportRequest as ExportRequest,
        ImportTemplateRequest as ImportTemplateRequest,
        OpenExportRequest as OpenExportRequest,
        OpenImportRequest as OpenImportRequest,
    )
    from coppice.requests.automation import (
        AutoStandbyHoldRequest as AutoStandbyHoldRequest,
        AutoStandbyRequest as AutoStandbyRequest,
        SnapshotScheduleRequest as SnapshotScheduleRequest,
        SnapshotScheduleRmRequest as SnapshotScheduleRmRequest,
        SnapshotScheduleSetRequest as SnapshotScheduleSetRequest,
    )
    from coppice.requests.base import Request as Request, StreamRequest as StreamRequest
    from coppice.requests.commands import (
        CommandAttachRequest as CommandAttachRequest,
        CommandForgetRequest as CommandForgetRequest,
        CommandKillRequest as CommandKillRequest,
        CommandLsRequest as CommandLsRequest,
        CommandStartRequest as CommandStartRequest,
        CommandWaitRequest as CommandWaitRequest,
    )
    from coppice.requests.files import (
        FileLsRequest as FileLsRequest,
        FileMkdirRequest as FileMkdirRequest,
        FileMvRequest as FileMvRequest,
        FileRmRequest as FileRmRequest,
        FileWatchRequest as FileWatchRequest,
    )
    from coppice.requests.forks import (
        FanOut as FanOut,
        ForkRequest as ForkRequest,
        SnapshotForkRequest as SnapshotForkRequest,
        StartAheadRequest as StartAheadRequest,
    )
    from coppice.requests.guest import (
        ConnectRequest as ConnectRequest,
        CpInRequest as CpInRequest,
        CpOutRequest as CpOutRequest,
        ExecRequest as ExecRequest,
        HealthRequest as HealthRequest,
        LogSource as LogSource,
        LogsRequest as LogsRequest,
        OpenCopyRequest as OpenCopyRequest,
        OpenExecRequest as OpenExecRequest,
        ReadFileRequest as ReadFileRequest,
        ReadyRequest as ReadyRequest,
        StatRequest as StatRequest,
        WaitProcessRequest as WaitProcessRequest,
        WaitRequest as WaitRequest,
        WriteFileRequest as WriteFileRequest,
    )
    from coppice.requests.host import (
        BudgetRequest as BudgetRequest,
        DoctorRequest as DoctorRequest,
        EventsRequest as EventsRequest,
        GcRequest as GcRequest,
        GetRequest as GetRequest,
        InspectRequest as InspectRequest,
        LsRequest as LsRequest,
        StatsRequest as StatsRequest,
        TreeRequest as TreeRequest,
        UnloadableRequest as UnloadableRequest,
        VerifyRequest as VerifyRequest,
    )
    from coppice.requests.images import (
        ImageBuildRequest as ImageBuildRequest,
        ImageImportRequest as ImageImportRequest,
        ImageInspectRequest as ImageInspectRequest,
        ImageLsRequest as ImageLsRequest,
        ImagePullRequest as ImagePullRequest,
        ImageRmRequest as ImageRmRequest,
        ImageTagRequest as ImageTagRequest,
        KernelAddRequest as KernelAddRequest,
        KernelFetchRequest as KernelFetchRequest,
        KernelLsRequest as KernelLsRequest,
        KernelRmRequest as KernelRmRequest,
    )
    from coppice.requests.machines import (
        DemoteRequest as DemoteRequest,
        EgressRequest as EgressRequest,
        PromoteRequest as PromoteRequest,
        RestoreRequest as RestoreRequest,
        RmRequest as RmRequest,
        RunRequest as RunRequest,
        StandbyRequest as StandbyRequest,
        StartRequest as StartRequest,
        StopRequest as StopRequest,
        UpdateRequest as UpdateRequest,
    )
    from coppice.requests.snapshots import (
        SnapshotInspectRequest as SnapshotInspectRequest,
        SnapshotLsRequest as SnapshotLsRequest,
        SnapshotRequest as SnapshotRequest,
        SnapshotRestoreRequest as SnapshotRestoreRequest,
        SnapshotRmRequest as SnapshotRmRequest,
    )
    from coppice.requests.volumes import (
        VolumeCreateRequest as VolumeCreateRequest,
        VolumeInspectRequest as VolumeInspectRequest,
        VolumeLsRequest as VolumeLsRequest,
        VolumeRmRequest as VolumeRmRequest,
    )

_NAMES = Names(
    __name__,
    {
        "archives": "ExportRequest ImportTemplateRequest OpenExportRequest OpenImportRequest",
        "automation": (
            "AutoStandbyHoldRequest AutoStandbyRequest SnapshotScheduleRequest SnapshotScheduleRmRequest "
            "SnapshotScheduleSetRequest"
        ),
        "base": "Request StreamRequest",
        "commands": (
            "CommandAttachRequest CommandForgetRequest CommandKillRequest CommandLsRequest CommandStartRequest "
            "CommandWaitRequest"
        ),
        "files": "FileLsRequest FileMkdirRequest FileMvRequest FileRmRequest FileWatchRequest",
        "forks": "FanOut ForkRequest SnapshotForkRequest StartAheadRequest",
        "guest": (
            "ConnectRequest CpInRequest CpOutRequest ExecRequest HealthRequest LogSource LogsRequest "
            "OpenCopyRequest OpenExecRequest ReadFileRequest ReadyRequest StatRequest WaitProcessRequest "
            "WaitRequest WriteFileRequest"
        ),
        "host": (
            "BudgetRequest DoctorRequest EventsRequest GcRequest GetRequest InspectRequest LsRequest "
            "StatsRequest TreeRequest UnloadableRequest VerifyRequest"
        ),
        "images": (
            "ImageBuildRequest ImageImportRequest ImageInspectRequest ImageLsRequest ImagePullRequest "
            "ImageRmRequest ImageTagRequest KernelAddRequest KernelFetchRequest KernelLsRequest KernelRmRequest"
        ),
        "machines": (
            "DemoteRequest EgressRequest PromoteRequest RestoreRequest RmRequest RunRequest StandbyRequest "
            "StartRequest StopRequest UpdateRequest"
        ),
        "snapshots": (
            "SnapshotInspectRequest SnapshotLsRequest SnapshotRequest SnapshotRestoreRequest SnapshotRmRequest"
        ),
        "volumes": "VolumeCreateRequest VolumeInspectRequest VolumeLsRequest VolumeRmRequest",
    },
)
__all__ = sorted(_NAMES)
__getattr__ = _NAMES.find
