"""Coppice grows many virtual machines from one warm template.

The forks of a template share one memory file copy-on-write:

    import coppice

    with coppice.Host() as host, host.run("debian") as vm:
        print(vm.exec(["uname", "-r"]).stdout)

`Host` is for blocking code, `AsyncHost` for asyncio. Both have the same methods and use
the same data directory. Names are imported at first use, which keeps `import coppice` fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coppice.client import (
        AsyncForks,
        AsyncHost,
        AsyncImages,
        AsyncKernels,
        AsyncMachine,
        AsyncSnapshots,
        AsyncVolumes,
        Forks,
        Host,
        Images,
        Kernels,
        Machine,
        Snapshots,
        Volumes,
    )
    from coppice.client.connecting import connect, connect_async
    from coppice.errors import (
        Busy,
        CommandNotFound,
        CommandNotStarted,
        CoppiceError,
        DigestMismatch,
        Expired,
        Forbidden,
        GuestError,
        GuestProtocolError,
        GuestRefused,
        GuestTimeout,
        HostCannot,
        IllegalTransition,
        ImageError,
        InStandby,
        IntegrityError,
        InUse,
        InvalidName,
        KeyReused,
        MissingTool,
        NameTaken,
        NoSpace,
        NotFound,
        NotSupported,
        OutcomeUnknown,
        Overloaded,
        Refused,
        TooManyOperations,
        Unauthorized,
        UnsafePath,
        UsageError,
        VmmDied,
        VmmError,
        VmmTimeout,
    )
    from coppice.machine.rooms import Deadlines
    from coppice.model import (
        Attachment,
        Budgets,
        BudgetUse,
        Capture,
        CaptureReport,
        Check,
        Difference,
        ExecResult,
        FileEvent,
        FileStat,
        ForkReport,
        ForkResult,
        GcReport,
        HealthCheck,
        Image,
        ImageConfig,
        Instance,
        Limits,
        MachineSpec,
        Manifest,
        MemFile,
        MemLayer,
        MemoryReport,
        Observed,
        ProcessSpec,
        Progress,
        ProgressSink,
        Publish,
        RestartPolicy,
        Sharing,
        Snapshot,
        SnapshotKind,
        State,
        Supervision,
        Traffic,
        TreeNode,
        VerifyReport,
        VmmProcess,
        Volume,
        VolumeDisk,
        VolumeMount,
    )
    from coppice.model.automation import AutoStandbyStatus, SnapshotSchedule
    from coppice.model.events import Event
    from coppice.model.guest import ExecSession, Exit, Health
    from coppice.model.inspection import Inspection, SnapshotInspection, StandbyReport, VolumeInspection
    from coppice.model.kernel import Kernel

__version__ = "0.1.0"

_ERRORS = (
    "Busy", "CommandNotFound", "CommandNotStarted", "CoppiceError", "DigestMismatch", "Expired", "Forbidden", "GuestError", "GuestProtocolError",
    "GuestRefused", "GuestTimeout", "HostCannot", "IllegalTransition", "ImageError", "InStandby", "InUse", "IntegrityError", "InvalidName",
    "KeyReused", "MissingTool", "NameTaken", "NoSpace", "NotFound", "NotSupported", "OutcomeUnknown",
    "Overloaded", "Refused", "TooManyOperations", "Unauthorized", "UnsafePath", "UsageError", "VmmDied", "VmmError",
    "VmmTimeout",
)  # fmt: skip
_MODEL = (
    "Attachment", "BudgetUse", "Budgets", "Capture", "CaptureReport", "Check", "Difference", "ExecResult",
    "FileEvent", "FileStat", "ForkReport", "ForkResult", "GcReport",
    "HealthCheck", "Image", "ImageConfig", "Instance",
    "Limits", "MachineSpec", "Manifest", "MemFile", "MemLayer", "MemoryReport", "Observed", "ProcessSpec", "Progress", "ProgressSink", "Publish",
    "RestartPolicy", "Sharing", "Snapshot", "SnapshotKind", "State", "Supervision", "Traffic", "TreeNode", "VerifyReport", "VmmProcess",
    "Volume", "VolumeDisk", "VolumeMount",
)  # fmt: skip
_CLIENT = (
    "AsyncForks", "AsyncHost", "AsyncImages", "AsyncKernels", "AsyncMachine", "AsyncSnapshots", "AsyncVolumes", "Forks", "Host",
    "Images", "Kernels", "Machine", "Snapshots", "Volumes",
)  # fmt: skip
_HOME = {
    "Deadlines": "coppice.machine.rooms",
    **dict.fromkeys(("connect", "connect_async"), "coppice.client.connecting"),
    **dict.fromkeys(_CLIENT, "coppice.client"),
    **dict.fromkeys(("ExecSession", "Exit", "Health"), "coppice.model.guest"),
    **dict.fromkeys(
        ("Inspection", "SnapshotInspection", "StandbyReport", "VolumeInspection"), "coppice.model.inspection"
    ),
    **dict.fromkeys(("AutoStandbyStatus", "SnapshotSchedule"), "coppice.model.automation"),
    "Event": "coppice.model.events",
    "Kernel": "coppice.model.kernel",
    **dict.fromkeys(_ERRORS, "coppice.errors"),
    **dict.fromkeys(_MODEL, "coppice.model"),
}

__all__ = [
    "AsyncForks",
    "AsyncHost",
    "AsyncImages",
    "AsyncKernels",
    "AsyncMachine",
    "AsyncSnapshots",
    "AsyncVolumes",
    "Attachment",
    "AutoStandbyStatus",
    "BudgetUse",
    "Budgets",
    "Busy",
    "Capture",
    "CaptureReport",
    "Check",
    "CommandNotFound",
    "CommandNotStarted",
    "CoppiceError",
    "Deadlines",
    "Difference",
    "DigestMismatch",
    "Event",
    "ExecResult",
    "ExecSession",
    "Exit",
    "Expired",
    "FileEvent",
    "FileStat",
    "Forbidden",
    "ForkReport",
    "ForkResult",
    "Forks",
    "GcReport",
    "GuestError",
    "GuestProtocolError",
    "GuestRefused",
    "GuestTimeout",
    "Health",
    "HealthCheck",
    "Host",
    "HostCannot",
    "IllegalTransition",
    "Image",
    "ImageConfig",
    "ImageError",
    "Images",
    "InStandby",
    "InUse",
    "Inspection",
    "Instance",
    "IntegrityError",
    "InvalidName",
    "Kernel",
    "Kernels",
    "KeyReused",
    "Limits",
    "Machine",
    "MachineSpec",
    "Manifest",
    "MemFile",
    "MemLayer",
    "MemoryReport",
    "MissingTool",
    "NameTaken",
    "NoSpace",
    "NotFound",
    "NotSupported",
    "Observed",
    "OutcomeUnknown",
    "Overloaded",
    "ProcessSpec",
    "Progress",
    "ProgressSink",
    "Publish",
    "Refused",
    "RestartPolicy",
    "Sharing",
    "Snapshot",
    "SnapshotInspection",
    "SnapshotKind",
    "SnapshotSchedule",
    "Snapshots",
    "StandbyReport",
    "State",
    "Supervision",
    "TooManyOperations",
    "Traffic",
    "TreeNode",
    "Unauthorized",
    "UnsafePath",
    "UsageError",
    "VerifyReport",
    "VmmDied",
    "VmmError",
    "VmmProcess",
    "VmmTimeout",
    "Volume",
    "VolumeDisk",
    "VolumeInspection",
    "VolumeMount",
    "Volumes",
    "__version__",
    "connect",
    "connect_async",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'coppice' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
