"""Coppice grows many virtual machines from one warm template.

The forks of a template share one memory file copy-on-write:

    import coppice

    with coppice.Host() as host, host.run("debian") as vm:
        print(vm.exec(["uname", "-r"]).stdout)

`Host` is for blocking code, `AsyncHost` for asyncio. Both have the same methods and use
the same data directory. Names are imported at first use, which keeps `import coppice` fast.
"""

from __future__ import annotations

from coppice.lazily import Names

TYPE_CHECKING = False  # `typing` takes 10 ms, in which Ctrl-C at the start of a command shows a traceback
if TYPE_CHECKING:
    from coppice.client import (
        AsyncForks as AsyncForks,
        AsyncHost as AsyncHost,
        AsyncImages as AsyncImages,
        AsyncKernels as AsyncKernels,
        AsyncMachine as AsyncMachine,
        AsyncSnapshots as AsyncSnapshots,
        AsyncVolumes as AsyncVolumes,
        Forks as Forks,
        Host as Host,
        Images as Images,
        Kernels as Kernels,
        Machine as Machine,
        Snapshots as Snapshots,
        Volumes as Volumes,
    )
    from coppice.client.connecting import connect as connect, connect_async as connect_async
    from coppice.errors import (
        Busy as Busy,
        CommandNotFound as CommandNotFound,
        CommandNotStarted as CommandNotStarted,
        CoppiceError as CoppiceError,
        DigestMismatch as DigestMismatch,
        Expired as Expired,
        Forbidden as Forbidden,
        GuestError as GuestError,
        GuestProtocolError as GuestProtocolError,
        GuestRefused as GuestRefused,
        GuestTimeout as GuestTimeout,
        HostCannot as HostCannot,
        IllegalTransition as IllegalTransition,
        ImageError as ImageError,
        InStandby as InStandby,
        IntegrityError as IntegrityError,
        InUse as InUse,
        InvalidName as InvalidName,
        KeyReused as KeyReused,
        MissingTool as MissingTool,
        NameTaken as NameTaken,
        NoSpace as NoSpace,
        NotFound as NotFound,
        NotSupported as NotSupported,
        OutcomeUnknown as OutcomeUnknown,
        Overloaded as Overloaded,
        Refused as Refused,
        TooManyOperations as TooManyOperations,
        Unauthorized as Unauthorized,
        UnsafePath as UnsafePath,
        UsageError as UsageError,
        VmmDied as VmmDied,
        VmmError as VmmError,
        VmmTimeout as VmmTimeout,
    )
    from coppice.machine.rooms import Deadlines as Deadlines
    from coppice.model import (
        Attachment as Attachment,
        Budgets as Budgets,
        BudgetUse as BudgetUse,
        Capture as Capture,
        CaptureReport as CaptureReport,
        Check as Check,
        Difference as Difference,
        ExecResult as ExecResult,
        FileEvent as FileEvent,
        FileStat as FileStat,
        ForkReport as ForkReport,
        ForkResult as ForkResult,
        GcReport as GcReport,
        HealthCheck as HealthCheck,
        Image as Image,
        ImageConfig as ImageConfig,
        Instance as Instance,
        Limits as Limits,
        MachineSpec as MachineSpec,
        Manifest as Manifest,
        MemFile as MemFile,
        MemLayer as MemLayer,
        MemoryReport as MemoryReport,
        Observed as Observed,
        ProcessSpec as ProcessSpec,
        Progress as Progress,
        ProgressSink as ProgressSink,
        Publish as Publish,
        RestartPolicy as RestartPolicy,
        Sharing as Sharing,
        Snapshot as Snapshot,
        SnapshotKind as SnapshotKind,
        State as State,
        Supervision as Supervision,
        Traffic as Traffic,
        TreeNode as TreeNode,
        VerifyReport as VerifyReport,
        VmmProcess as VmmProcess,
        Volume as Volume,
        VolumeDisk as VolumeDisk,
        VolumeMount as VolumeMount,
    )
    from coppice.model.automation import AutoStandbyStatus as AutoStandbyStatus, SnapshotSchedule as SnapshotSchedule
    from coppice.model.events import Event as Event
    from coppice.model.guest import ExecSession as ExecSession, Exit as Exit, Health as Health
    from coppice.model.inspection import (
        Inspection as Inspection,
        SnapshotInspection as SnapshotInspection,
        StandbyReport as StandbyReport,
        VolumeInspection as VolumeInspection,
    )
    from coppice.model.kernel import Kernel as Kernel

__version__ = "0.1.0"

_NAMES = Names(
    __name__,
    {
        "client": (
            "AsyncForks AsyncHost AsyncImages AsyncKernels AsyncMachine AsyncSnapshots AsyncVolumes Forks Host "
            "Images Kernels Machine Snapshots Volumes"
        ),
        "client.connecting": "connect connect_async",
        "errors": (
            "Busy CommandNotFound CommandNotStarted CoppiceError DigestMismatch Expired Forbidden GuestError "
            "GuestProtocolError GuestRefused GuestTimeout HostCannot IllegalTransition ImageError InStandby "
            "IntegrityError InUse InvalidName KeyReused MissingTool NameTaken NoSpace NotFound NotSupported "
            "OutcomeUnknown Overloaded Refused TooManyOperations Unauthorized UnsafePath UsageError VmmDied "
            "VmmError VmmTimeout"
        ),
        "machine.rooms": "Deadlines",
        "model": (
            "Attachment Budgets BudgetUse Capture CaptureReport Check Difference ExecResult FileEvent FileStat "
            "ForkReport ForkResult GcReport HealthCheck Image ImageConfig Instance Limits MachineSpec Manifest "
            "MemFile MemLayer MemoryReport Observed ProcessSpec Progress ProgressSink Publish RestartPolicy "
            "Sharing Snapshot SnapshotKind State Supervision Traffic TreeNode VerifyReport VmmProcess Volume VolumeDisk "
            "VolumeMount"
        ),
        "model.automation": "AutoStandbyStatus SnapshotSchedule",
        "model.events": "Event",
        "model.guest": "ExecSession Exit Health",
        "model.inspection": "Inspection SnapshotInspection StandbyReport VolumeInspection",
        "model.kernel": "Kernel",
    },
)
__all__ = ["__version__", *sorted(_NAMES)]
__getattr__ = _NAMES.find


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
