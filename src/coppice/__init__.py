"""Coppice grows many virtual machines from one: warm templates, and copy-on-write forks that share one memory file.

    from coppice import Host

    with Host() as host, host.machine("debian") as vm:
        print(host.exec(vm, ["uname", "-r"]).stdout)

`Host` blocks, `AsyncHost` is for asyncio; both are the same use cases over the same data directory. Everything here is
imported at its first use, so that `import coppice` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coppice.errors import (
        Busy,
        CommandNotFound,
        CommandNotStarted,
        CoppiceError,
        DigestMismatch,
        GuestError,
        GuestProtocolError,
        GuestRefused,
        GuestTimeout,
        HostCannot,
        IllegalTransition,
        ImageError,
        IntegrityError,
        InUse,
        InvalidName,
        MissingTool,
        NameTaken,
        NoSpace,
        NotFound,
        NotSupported,
        Refused,
        UnsafePath,
        UsageError,
        VmmDied,
        VmmError,
        VmmTimeout,
    )
    from coppice.guest.control import Health
    from coppice.guest.kernel import Kernel
    from coppice.guest.process import Exit
    from coppice.host import AsyncHost, Inspection, SnapshotInspection, VolumeInspection
    from coppice.instance.rooms import Deadlines
    from coppice.model import (
        Attachment,
        Budgets,
        BudgetUse,
        CaptureReport,
        Check,
        Difference,
        ExecResult,
        FileStat,
        ForkReport,
        ForkResult,
        GcReport,
        Image,
        ImageConfig,
        Instance,
        MachineSpec,
        Manifest,
        MemFile,
        MemoryReport,
        ProcessSpec,
        Progress,
        ProgressSink,
        Publish,
        Sharing,
        Snapshot,
        SnapshotKind,
        StageTimings,
        State,
        TreeNode,
        VerifyReport,
        VmmProcess,
        Volume,
        VolumeDisk,
        VolumeMount,
    )
    from coppice.sync import Host

__version__ = "0.1.0"

_ERRORS = (
    "Busy", "CommandNotFound", "CommandNotStarted", "CoppiceError", "DigestMismatch", "GuestError", "GuestProtocolError",
    "GuestRefused", "GuestTimeout", "HostCannot", "IllegalTransition", "ImageError", "InUse", "IntegrityError", "InvalidName",
    "MissingTool", "NameTaken", "NoSpace", "NotFound", "NotSupported", "Refused", "UnsafePath", "UsageError", "VmmDied", "VmmError",
    "VmmTimeout",
)  # fmt: skip
_MODEL = (
    "Attachment", "BudgetUse", "Budgets", "CaptureReport", "Check", "Difference", "ExecResult", "FileStat", "ForkReport", "ForkResult", "GcReport", "Image",
    "ImageConfig", "Instance",
    "MachineSpec", "Manifest", "MemFile", "MemoryReport", "ProcessSpec", "Progress", "ProgressSink", "Publish", "Sharing",
    "Snapshot", "SnapshotKind", "StageTimings", "State", "TreeNode", "VerifyReport", "VmmProcess", "Volume", "VolumeDisk", "VolumeMount",
)  # fmt: skip
_HOME = {
    "Host": "coppice.sync",
    "AsyncHost": "coppice.host",
    "Deadlines": "coppice.instance.rooms",
    "Exit": "coppice.guest.process",
    "Health": "coppice.guest.control",
    "Inspection": "coppice.host",
    "SnapshotInspection": "coppice.host",
    "VolumeInspection": "coppice.host",
    "Kernel": "coppice.guest.kernel",
    **dict.fromkeys(_ERRORS, "coppice.errors"),
    **dict.fromkeys(_MODEL, "coppice.model"),
}

__all__ = [
    "AsyncHost",
    "Attachment",
    "BudgetUse",
    "Budgets",
    "Busy",
    "CaptureReport",
    "Check",
    "CommandNotFound",
    "CommandNotStarted",
    "CoppiceError",
    "Deadlines",
    "Difference",
    "DigestMismatch",
    "ExecResult",
    "Exit",
    "FileStat",
    "ForkReport",
    "ForkResult",
    "GcReport",
    "GuestError",
    "GuestProtocolError",
    "GuestRefused",
    "GuestTimeout",
    "Health",
    "Host",
    "HostCannot",
    "IllegalTransition",
    "Image",
    "ImageConfig",
    "ImageError",
    "InUse",
    "Inspection",
    "Instance",
    "IntegrityError",
    "InvalidName",
    "Kernel",
    "MachineSpec",
    "Manifest",
    "MemFile",
    "MemoryReport",
    "MissingTool",
    "NameTaken",
    "NoSpace",
    "NotFound",
    "NotSupported",
    "ProcessSpec",
    "Progress",
    "ProgressSink",
    "Publish",
    "Refused",
    "Sharing",
    "Snapshot",
    "SnapshotInspection",
    "SnapshotKind",
    "StageTimings",
    "State",
    "TreeNode",
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
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'coppice' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
