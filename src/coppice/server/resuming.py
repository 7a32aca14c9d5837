"""Names for what a request makes, and the continuation of a request after its server was killed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec

from coppice.commands import new_command_id
from coppice.completion import in_thread
from coppice.errors import NotFound, OutcomeUnknown
from coppice.host import LocalBackend
from coppice.model import ForkReport, ForkResult, Instance, Progress, ProgressSink
from coppice.model.guest import StartedCommand
from coppice.names import new_name
from coppice.requests import (
    CommandKillRequest,
    CommandLsRequest,
    CommandStartRequest,
    ExecRequest,
    FanOut,
    ForkRequest,
    ImportTemplateRequest,
    LsRequest,
    Request,
    RunRequest,
    SnapshotForkRequest,
    SnapshotLsRequest,
    SnapshotRequest,
    VolumeCreateRequest,
    VolumeLsRequest,
)

_REMOVALS: Final = frozenset({"rm", "command_forget", "image_rm", "kernel_rm", "snapshot_rm", "volume_rm"})
_CLOCKS_S: Final = 1.0  # more than the clocks of a host and of its guests differ by


async def generated(host: LocalBackend, request: Request[Any]) -> dict[str, Any]:
    """Return the names that a request leaves to the server, as fields of the request."""
    if isinstance(request, RunRequest | SnapshotRequest) and request.name is None:
        return {"name": new_name(await in_thread(_stem, host, request))}
    if isinstance(request, CommandStartRequest) and request.command is None:
        return {"command": new_command_id()}
    if isinstance(request, FanOut) and not request.names:
        stem = await in_thread(_stem, host, request)
        return {"names": [new_name(stem) for _ in range(request.count)]}
    return {}


def _stem(host: LocalBackend, request: Request[Any]) -> str:
    """Return the beginning of generated names. The operation itself reports what does not exist."""
    store = host.rooms.store
    try:
        if isinstance(request, SnapshotForkRequest):
            return store.snapshots.get(request.snapshot).source_name
        if isinstance(request, ForkRequest | SnapshotRequest):
            return store.get(request.instance).name
    except NotFound:
        pass
    name = request.image if isinstance(request, RunRequest) and ":" not in request.image else "vm"
    return "".join(each if each.isalnum() and each.isascii() else "-" for each in name.lower()).strip("-") or "vm"


def completed(request: Request[Any], names: Mapping[str, Any]) -> Request[Any]:
    """Return a request with its generated names."""
    return msgspec.structs.replace(request, **names) if names else request


async def resume(
    host: LocalBackend,
    request: Request[Any],
    progress: ProgressSink,
    begun_at: float,
    call: Callable[[], Awaitable[Any]],
) -> Any:
    """Finish an operation that a killed server began, or carry it out again.

    The host's recovery has undone what was half done. What was made completely is found by its
    name, and not made again.

    :param request: with generated names
    :param begun_at: when the killed server began; older objects of the same name are not its
    :param call: carries out the whole request
    :raises OutcomeUnknown: the operation cannot be repeated without a second effect
    """
    if isinstance(request, ExecRequest):
        raise OutcomeUnknown(
            f"the server was killed while {request.argv[0]!r} was under way in {request.instance}: it may have run",
            hint="check its effects in the guest before you run it again",
        )
    if isinstance(request, CommandKillRequest) and request.signal is not None:
        raise OutcomeUnknown(
            f"the server was killed while it sent signal {request.signal} to command {request.command}",
            hint=f"`coppice commands {request.instance}` shows whether the command runs",
        )
    if isinstance(request, CommandStartRequest):
        for each in await host.call(CommandLsRequest(instance=request.instance)):
            if each.id == request.command and each.started_at >= begun_at - _CLOCKS_S:
                return StartedCommand(id=each.id, pid=each.pid)
    if isinstance(request, FanOut):
        return await _resume_forks(host, request, progress, begun_at)
    if request.operation in _REMOVALS:
        try:
            return await call()
        except NotFound:
            return None  # the killed server removed it
    found: list[Any] = []
    if isinstance(request, RunRequest | ImportTemplateRequest):
        found = await host.call(LsRequest())
    elif isinstance(request, SnapshotRequest):
        found = await host.call(SnapshotLsRequest())
    elif isinstance(request, VolumeCreateRequest):
        found = await host.call(VolumeLsRequest())
    name = getattr(request, "name", None)
    made = next((each for each in found if each.name == name and each.created_at >= begun_at), None)
    return await call() if made is None else made


async def _resume_forks(host: LocalBackend, request: FanOut, progress: ProgressSink, begun_at: float) -> ForkReport:
    names = request.child_names
    made = {
        each.name: each for each in await host.call(LsRequest()) if each.name in names and each.created_at >= begun_at
    }
    for count, instance in enumerate(made.values(), 1):
        progress(Progress(stage="fork", done=count, total=len(names), fork=_result(instance)))
    missing = [name for name in names if name not in made]
    results = {name: _result(instance) for name, instance in made.items()}
    report: ForkReport | None = None
    if missing:
        payloads = [data for name, data in zip(names, request.payloads, strict=False) if name in missing]
        rest = msgspec.structs.replace(request, names=missing, count=len(missing), payloads=payloads)
        report = await host.call(rest, progress)
        results |= {each.name: each for each in report.results}
    ordered = tuple(results[name] for name in names)
    succeeded = sum(each.ok for each in ordered)
    if report is not None:
        return msgspec.structs.replace(report, count=len(names), succeeded=succeeded, results=ordered)
    first = made[names[0]]
    return ForkReport(
        source=first.parent or "",
        source_name=first.parent_name or "",
        count=len(names),
        succeeded=succeeded,
        wall_ms=0.0,
        results=ordered,
    )


def _result(instance: Instance) -> ForkResult:
    mem_file = instance.mem_file
    return ForkResult(
        name=instance.name,
        ok=True,
        instance=instance,
        sharing=mem_file.sharing if mem_file else None,
        sharing_reason=mem_file.reason if mem_file else "",
    )
