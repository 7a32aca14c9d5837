"""The operations of a host, each defined once: one request record per operation.

A request lists the operation's parameters with their types, defaults and descriptions. It also
names the type of the result. `tools/generate_client.py` generates the methods of the Python API,
their blocking twins and their documentation from these records. The JSON form and the JSON schema
come from msgspec. Every request is valid: its constructor raises UsageError or InvalidName for a
wrong type, or for a value that can never be accepted.

Each module is imported at the first use of one of its names: a command needs one or two of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from coppice.requests.archives import (
        ExportRequest,
        ImportTemplateRequest,
        OpenExportRequest,
        OpenImportRequest,
    )
    from coppice.requests.automation import (
        AutoStandbyHoldRequest,
        AutoStandbyRequest,
        SnapshotScheduleRequest,
        SnapshotScheduleRmRequest,
        SnapshotScheduleSetRequest,
    )
    from coppice.requests.base import Request, StreamRequest
    from coppice.requests.commands import (
        CommandAttachRequest,
        CommandForgetRequest,
        CommandKillRequest,
        CommandLsRequest,
        CommandStartRequest,
        CommandWaitRequest,
    )
    from coppice.requests.files import (
        FileLsRequest,
        FileMkdirRequest,
        FileMvRequest,
        FileRmRequest,
        FileWatchRequest,
    )
    from coppice.requests.forks import FanOut, ForkRequest, SnapshotForkRequest, StartAheadRequest
    from coppice.requests.guest import (
        ConnectRequest,
        CpInRequest,
        CpOutRequest,
        ExecRequest,
        HealthRequest,
        LogSource,
        LogsRequest,
        OpenCopyRequest,
        OpenExecRequest,
        ReadFileRequest,
        ReadyRequest,
        StatRequest,
        WaitProcessRequest,
        WaitRequest,
        WriteFileRequest,
    )
    from coppice.requests.host import (
        BudgetRequest,
        DoctorRequest,
        EventsRequest,
        GcRequest,
        GetRequest,
        InspectRequest,
        LsRequest,
        StatsRequest,
        TreeRequest,
        UnloadableRequest,
        VerifyRequest,
    )
    from coppice.requests.images import (
        ImageBuildRequest,
        ImageImportRequest,
        ImageInspectRequest,
        ImageLsRequest,
        ImagePullRequest,
        ImageRmRequest,
        ImageTagRequest,
        KernelAddRequest,
        KernelFetchRequest,
        KernelLsRequest,
        KernelRmRequest,
    )
    from coppice.requests.machines import (
        DemoteRequest,
        EgressRequest,
        PromoteRequest,
        RestoreRequest,
        RmRequest,
        RunRequest,
        StandbyRequest,
        StartRequest,
        StopRequest,
        UpdateRequest,
    )
    from coppice.requests.snapshots import (
        SnapshotInspectRequest,
        SnapshotLsRequest,
        SnapshotRequest,
        SnapshotRestoreRequest,
        SnapshotRmRequest,
    )
    from coppice.requests.volumes import (
        VolumeCreateRequest,
        VolumeInspectRequest,
        VolumeLsRequest,
        VolumeRmRequest,
    )

__all__ = [
    "AutoStandbyHoldRequest",
    "AutoStandbyRequest",
    "BudgetRequest",
    "CommandAttachRequest",
    "CommandForgetRequest",
    "CommandKillRequest",
    "CommandLsRequest",
    "CommandStartRequest",
    "CommandWaitRequest",
    "ConnectRequest",
    "CpInRequest",
    "CpOutRequest",
    "DemoteRequest",
    "DoctorRequest",
    "EgressRequest",
    "EventsRequest",
    "ExecRequest",
    "ExportRequest",
    "FanOut",
    "FileLsRequest",
    "FileMkdirRequest",
    "FileMvRequest",
    "FileRmRequest",
    "FileWatchRequest",
    "ForkRequest",
    "GcRequest",
    "GetRequest",
    "HealthRequest",
    "ImageBuildRequest",
    "ImageImportRequest",
    "ImageInspectRequest",
    "ImageLsRequest",
    "ImagePullRequest",
    "ImageRmRequest",
    "ImageTagRequest",
    "ImportTemplateRequest",
    "InspectRequest",
    "KernelAddRequest",
    "KernelFetchRequest",
    "KernelLsRequest",
    "KernelRmRequest",
    "LogSource",
    "LogsRequest",
    "LsRequest",
    "OpenCopyRequest",
    "OpenExecRequest",
    "OpenExportRequest",
    "OpenImportRequest",
    "PromoteRequest",
    "ReadFileRequest",
    "ReadyRequest",
    "Request",
    "RestoreRequest",
    "RmRequest",
    "RunRequest",
    "SnapshotForkRequest",
    "SnapshotInspectRequest",
    "SnapshotLsRequest",
    "SnapshotRequest",
    "SnapshotRestoreRequest",
    "SnapshotRmRequest",
    "SnapshotScheduleRequest",
    "SnapshotScheduleRmRequest",
    "SnapshotScheduleSetRequest",
    "StandbyRequest",
    "StartAheadRequest",
    "StartRequest",
    "StatRequest",
    "StatsRequest",
    "StopRequest",
    "StreamRequest",
    "TreeRequest",
    "UnloadableRequest",
    "UpdateRequest",
    "VerifyRequest",
    "VolumeCreateRequest",
    "VolumeInspectRequest",
    "VolumeLsRequest",
    "VolumeRmRequest",
    "WaitProcessRequest",
    "WaitRequest",
    "WriteFileRequest",
]

_MODULES: Final = {
    "archives": "ExportRequest ImportTemplateRequest OpenExportRequest OpenImportRequest",
    "automation": (
        "AutoStandbyHoldRequest AutoStandbyRequest "
        "SnapshotScheduleRequest SnapshotScheduleRmRequest SnapshotScheduleSetRequest"
    ),
    "base": "Request StreamRequest",
    "commands": (
        "CommandAttachRequest CommandForgetRequest CommandKillRequest "
        "CommandLsRequest CommandStartRequest CommandWaitRequest"
    ),
    "files": "FileLsRequest FileMkdirRequest FileMvRequest FileRmRequest FileWatchRequest",
    "forks": "FanOut ForkRequest SnapshotForkRequest StartAheadRequest",
    "guest": (
        "ConnectRequest CpInRequest CpOutRequest ExecRequest HealthRequest LogSource LogsRequest "
        "OpenCopyRequest OpenExecRequest ReadFileRequest ReadyRequest StatRequest WaitProcessRequest WaitRequest "
        "WriteFileRequest"
    ),
    "host": (
        "BudgetRequest DoctorRequest EventsRequest GcRequest GetRequest InspectRequest LsRequest "
        "StatsRequest TreeRequest UnloadableRequest VerifyRequest"
    ),
    "images": (
        "ImageBuildRequest ImageImportRequest ImageInspectRequest ImageLsRequest ImagePullRequest "
        "ImageRmRequest ImageTagRequest KernelAddRequest KernelFetchRequest KernelLsRequest "
        "KernelRmRequest"
    ),
    "machines": (
        "DemoteRequest EgressRequest PromoteRequest RestoreRequest RmRequest RunRequest StandbyRequest "
        "StartRequest StopRequest UpdateRequest"
    ),
    "snapshots": ("SnapshotInspectRequest SnapshotLsRequest SnapshotRequest SnapshotRestoreRequest SnapshotRmRequest"),
    "volumes": "VolumeCreateRequest VolumeInspectRequest VolumeLsRequest VolumeRmRequest",
}
_HOME: Final = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
