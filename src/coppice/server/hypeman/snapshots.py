"""`/snapshots` and `/instances/{id}/snapshots` of the hypeman API."""

from __future__ import annotations

from typing import Annotated, Any, Final

from litestar import Request as HttpRequest
from litestar import delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from coppice.errors import NotSupported, UsageError
from coppice.model import SnapshotKind, State
from coppice.requests import (
    SnapshotForkRequest,
    SnapshotInspectRequest,
    SnapshotLsRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    SnapshotRmRequest,
)
from coppice.server.auth import Caller
from coppice.server.context import TheCaller, TheServer
from coppice.server.hypeman.instances import compresses, only_child, refuse
from coppice.server.hypeman.paths import find, tags_in
from coppice.server.hypeman.wire import (
    Instance,
    InstanceFork,
    Kind,
    Snapshot,
    SnapshotCreate,
    SnapshotRestore,
    instance_of,
    snapshot_of,
)

_READ: Final = {"scope": "snapshot:read"}
_WRITE: Final = {"scope": "snapshot:write"}
_TAGS: Final = ["snapshots"]


@post("/instances/{key:str}/snapshots", summary="Save a snapshot.", tags=_TAGS, opt=_WRITE)
async def snapshot_create(
    key: FromPath[str], data: JSONBody[SnapshotCreate], server: TheServer, caller: TheCaller
) -> Snapshot:
    """Save the state of an instance. A running instance continues."""
    refuse({"compression": compresses(data.compression)})
    found = await find(await server.host(caller), key)
    request = SnapshotRequest(instance=found.id, name=data.name, kind=SnapshotKind(data.kind), tags=data.tags)
    return snapshot_of(await server.carry_out(caller, request))


@get("/snapshots", summary="List snapshots.", tags=_TAGS, opt=_READ)
async def snapshots_list(
    request: HttpRequest[Caller, Any, Any],
    server: TheServer,
    caller: TheCaller,
    source_instance_id: Annotated[str | None, QueryParameter(description="Only snapshots of this instance.")] = None,
    kind: Annotated[Kind | None, QueryParameter(description="Only snapshots of this kind.")] = None,
    name: Annotated[str | None, QueryParameter(description="Only the snapshot with this name.")] = None,
) -> list[Snapshot]:
    """List the caller's snapshots."""
    host = await server.host(caller)
    tags = tags_in(list(request.query_params.multi_items()))
    found = await host.call(SnapshotLsRequest(source=source_instance_id, tags=tags))
    return [snapshot_of(each) for each in found if kind in (None, str(each.kind)) and name in (None, each.name)]


@get("/snapshots/{key:str}", summary="Get a snapshot.", tags=_TAGS, opt=_READ)
async def snapshot_get(key: FromPath[str], server: TheServer, caller: TheCaller) -> Snapshot:
    """Return a snapshot by id or name."""
    host = await server.host(caller)
    return snapshot_of((await host.call(SnapshotInspectRequest(snapshot=key))).snapshot)


@delete("/snapshots/{key:str}", summary="Remove a snapshot.", tags=_TAGS, opt={"scope": "snapshot:delete"})
async def snapshot_delete(key: FromPath[str], server: TheServer, caller: TheCaller) -> None:
    """Remove a snapshot. Its forks keep the memory that they share with it."""
    await server.carry_out(caller, SnapshotRmRequest(snapshot=key))


@post("/snapshots/{key:str}/fork", summary="Fork a snapshot once.", tags=_TAGS, opt=_WRITE)
async def snapshot_fork(
    key: FromPath[str], data: JSONBody[InstanceFork], server: TheServer, caller: TheCaller
) -> Instance:
    """Make one fork. By default a fork of a snapshot with memory runs, and one without is stopped."""
    host = await server.host(caller)
    found = (await host.call(SnapshotInspectRequest(snapshot=key))).snapshot
    target = data.target_state or ("Running" if found.kind is SnapshotKind.STANDBY else "Stopped")
    request = SnapshotForkRequest(
        snapshot=found.id, names=[data.name], target=State(target), vmm=data.target_hypervisor
    )
    return instance_of(only_child(await server.carry_out(caller, request)))


@post(
    "/instances/{key:str}/snapshots/{snapshot:str}/restore",
    summary="Restore an instance in place.",
    tags=_TAGS,
    status_code=200,
    opt=_WRITE,
)
async def snapshot_restore(
    key: FromPath[str],
    snapshot: FromPath[str],
    data: JSONBody[SnapshotRestore],
    server: TheServer,
    caller: TheCaller,
) -> Instance:
    """Replace an instance's state by that of one of its snapshots."""
    refuse({"target_hypervisor": data.target_hypervisor})
    host = await server.host(caller)
    instance = await find(host, key)
    found = (await host.call(SnapshotInspectRequest(snapshot=snapshot))).snapshot
    if found.source != instance.id:
        raise UsageError(
            f"the snapshot {found.name} is not of {instance.name}",
            hint="GET /snapshots?source_instance_id=ID lists them",
        )
    saved = str(found.kind)  # also the state of an instance that has just been restored to it
    if data.target_state not in (None, "Running", saved):
        raise NotSupported(
            f"the {saved} snapshot {found.name} cannot be restored to {data.target_state}",
            hint=f"restore it to {saved} or Running",
        )
    start = (data.target_state or ("Running" if found.kind is SnapshotKind.STANDBY else saved)) == "Running"
    return instance_of(await server.carry_out(caller, SnapshotRestoreRequest(snapshot=found.id, start=start)))


ROUTES: Final = [
    snapshot_create,
    snapshots_list,
    snapshot_get,
    snapshot_delete,
    snapshot_fork,
    snapshot_restore,
]
