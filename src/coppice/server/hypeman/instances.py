"""`/instances` of the hypeman API: list, create, get, change state, fork, remove."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

from litestar import Request as HttpRequest
from litestar import delete, get, patch, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from coppice.completion import in_thread
from coppice.errors import NotSupported, UsageError, kind_of
from coppice.model import ForkReport, State
from coppice.model import VolumeMount as Mount
from coppice.requests import (
    DemoteRequest,
    ForkRequest,
    InspectRequest,
    LsRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
    UpdateRequest,
)
from coppice.server.auth import Caller
from coppice.server.context import TheCaller, TheServer
from coppice.server.ending import unless_ending
from coppice.server.hypeman.paths import find, seconds, tags_in
from coppice.server.hypeman.policies import policies_of
from coppice.server.hypeman.sizes import parse_size
from coppice.server.hypeman.wire import (
    Instance,
    InstanceCreate,
    InstanceFork,
    InstanceStandby,
    InstanceStart,
    InstanceUpdate,
    Waited,
    inspected,
    instance_of,
)

READ: Final = {"scope": "instance:read"}
WRITE: Final = {"scope": "instance:write"}
DELETE: Final = {"scope": "instance:delete"}
TAGS: Final = ["instances"]
PLATFORM: Final = "linux/amd64"
_MISSING: Final = ("devices", "gpu", "credentials", "snapshot_policy", "skip_guest_agent", "disk_io_bps")
_POLL_S: Final = 0.05  # another process can change the state, which has no event
_LONGEST_WAIT_S: Final = 300.0
_FINAL: Final = frozenset({State.UNKNOWN, State.STOPPED, State.STANDBY, State.TEMPLATE})


@get("/instances", summary="List instances.", tags=TAGS, opt=READ)
async def instances_list(
    request: HttpRequest[Caller, Any, Any],
    server: TheServer,
    caller: TheCaller,
    wanted: Annotated[State | None, QueryParameter(name="state", description="Only instances in this state.")] = None,
) -> list[Instance]:
    """List the caller's instances, filtered by state and by `tags[k]=v`."""
    host = await server.host(caller)
    found = await host.call(LsRequest(state=wanted, tags=tags_in(list(request.query_params.multi_items()))))
    counts = await in_thread(host.rooms.store.fork_counts)
    return [instance_of(each, counts.get(each.id, 0)) for each in found]


@post("/instances", summary="Create an instance and start it.", tags=TAGS, opt=WRITE)
async def instance_create(data: JSONBody[InstanceCreate], server: TheServer, caller: TheCaller) -> Instance:
    """Boot an instance of an image. The answer comes when its agent has answered."""
    refuse({name: getattr(data, name) for name in _MISSING})
    refuse(
        {
            "platform": data.platform not in (None, "", PLATFORM),
            "network.bandwidth": data.network.bandwidth_download or data.network.bandwidth_upload,
            "network.egress": data.network.egress and data.network.egress.enabled,
            "volumes.overlay": any(each.overlay for each in data.volumes),
        }
    )
    made = await server.carry_out(
        caller,
        RunRequest(
            image=data.image,
            command=data.cmd or (),
            entrypoint=data.entrypoint,
            name=data.name,
            cpus=data.vcpus,
            memory_bytes=parse_size(data.size, "size"),
            overlay_bytes=parse_size(data.overlay_size, "overlay_size"),
            env=data.env,
            tags=data.tags,
            network=None if data.network.enabled else "none",
            vmm=data.hypervisor,
            volumes=[
                Mount(volume=each.volume_id, mount_path=each.mount_path, readonly=each.readonly)
                for each in data.volumes
            ],
            **policies_of(data),
        ),
    )
    return instance_of(made)


@get("/instances/{key:str}", summary="Get an instance.", tags=TAGS, opt=READ)
async def instance_get(key: FromPath[str], server: TheServer, caller: TheCaller) -> Instance:
    """Return an instance by id, name, or the beginning of its id, with its forks and its memory."""
    host = await server.host(caller)
    found = await find(host, key)
    return inspected(await host.call(InspectRequest(instance=found.id)))


@patch("/instances/{key:str}", summary="Change the policies of an instance.", tags=TAGS, opt=WRITE)
async def instance_update(
    key: FromPath[str], data: JSONBody[InstanceUpdate], server: TheServer, caller: TheCaller
) -> Instance:
    """Change what is given. `ttl` counts from now; `0s` means that the instance never expires."""
    refuse({"env": data.env})
    found = await find(await server.host(caller), key)
    return instance_of(await server.carry_out(caller, UpdateRequest(instance=found.id, **policies_of(data))))


@delete("/instances/{key:str}", summary="Stop and remove an instance.", tags=TAGS, opt=DELETE)
async def instance_delete(
    key: FromPath[str], server: TheServer, caller: TheCaller, graceful_shutdown: FromQuery[bool] = True
) -> None:
    """Remove an instance in any state. A running guest may first power off by itself."""
    found = await find(await server.host(caller), key)
    if graceful_shutdown and found.state is State.RUNNING:
        await server.carry_out(caller, StopRequest(instance=found.id))
    await server.carry_out(caller, RmRequest(instance=found.id))


@post("/instances/{key:str}/start", summary="Start a stopped instance.", tags=TAGS, status_code=200, opt=WRITE)
async def instance_start(
    key: FromPath[str], data: JSONBody[InstanceStart | None], server: TheServer, caller: TheCaller
) -> Instance:
    """Boot an instance from its disk. A running instance stays as it is."""
    found = await find(await server.host(caller), key)
    given = data or InstanceStart()
    # Empty lists change nothing there.
    request = StartRequest(instance=found.id, command=given.cmd or None, entrypoint=given.entrypoint or None)
    return instance_of(await server.carry_out(caller, request))


@post("/instances/{key:str}/stop", summary="Stop an instance.", tags=TAGS, status_code=200, opt=WRITE)
async def instance_stop(key: FromPath[str], server: TheServer, caller: TheCaller) -> Instance:
    """Let the guest power off, and end it if it does not. A stopped instance stays as it is."""
    found = await find(await server.host(caller), key)
    if found.state is State.STOPPED:
        return instance_of(found)
    return instance_of(await server.carry_out(caller, StopRequest(instance=found.id)))


@post("/instances/{key:str}/standby", summary="Capture an instance.", tags=TAGS, status_code=200, opt=WRITE)
async def instance_standby(
    key: FromPath[str], data: JSONBody[InstanceStandby | None], server: TheServer, caller: TheCaller
) -> Instance:
    """Save memory and disk, and end the VMM. An instance in standby stays as it is."""
    refuse({"compression": data is not None and compresses(data.compression)})
    found = await find(await server.host(caller), key)
    return instance_of((await server.carry_out(caller, StandbyRequest(instance=found.id))).instance)


@post("/instances/{key:str}/restore", summary="Restore an instance.", tags=TAGS, status_code=200, opt=WRITE)
async def instance_restore(key: FromPath[str], server: TheServer, caller: TheCaller) -> Instance:
    """Continue an instance from its captured memory. A running instance stays as it is."""
    found = await find(await server.host(caller), key)
    return instance_of(await server.carry_out(caller, RestoreRequest(instance=found.id)))


@post("/instances/{key:str}/promote-template", summary="Make a template.", tags=TAGS, status_code=200, opt=WRITE)
async def instance_promote(key: FromPath[str], server: TheServer, caller: TheCaller) -> Instance:
    """Make an instance in standby a template, which can only be forked."""
    found = await find(await server.host(caller), key)
    return instance_of(await server.carry_out(caller, PromoteRequest(instance=found.id)))


@post(
    "/instances/{key:str}/demote-template",
    summary="Make a template an instance in standby.",
    tags=TAGS,
    status_code=200,
    opt=WRITE,
)
async def instance_demote(key: FromPath[str], server: TheServer, caller: TheCaller) -> Instance:
    """Refused while the template has forks."""
    found = await find(await server.host(caller), key)
    return instance_of(await server.carry_out(caller, DemoteRequest(instance=found.id)))


@post("/instances/{key:str}/fork", summary="Fork an instance once.", tags=TAGS, opt=WRITE)
async def instance_fork(
    key: FromPath[str], data: JSONBody[InstanceFork], server: TheServer, caller: TheCaller
) -> Instance:
    """Make one fork. `POST /call/fork` makes many at once and reports on each."""
    source = await find(await server.host(caller), key)
    target = data.target_state or ("Running" if source.state is State.TEMPLATE else str(source.state))
    report = await server.carry_out(
        caller,
        ForkRequest(
            instance=source.id,
            names=[data.name],
            target=State(target) if target in ("Running", "Standby", "Stopped") else State.RUNNING,
            from_running=data.from_running and source.state is State.RUNNING,
            vmm=data.target_hypervisor,
            tags=source.tags,
        ),
    )
    return instance_of(only_child(report))


def only_child(report: ForkReport) -> Any:
    """Return the instance of a fan-out of one.

    :raises CoppiceError: the fork failed
    """
    (result,) = report.results
    if result.instance is None:
        raise kind_of(result.error_code or "")(result.error or "the fork failed")
    return result.instance


@get("/instances/{key:str}/wait", summary="Wait for a state.", tags=TAGS, opt=READ)
async def instance_wait(
    key: FromPath[str],
    server: TheServer,
    caller: TheCaller,
    wanted: Annotated[State, QueryParameter(name="state", description="The state to wait for.")],
    longest: Annotated[
        str, QueryParameter(name="timeout", description="Longest wait, such as 30s; at most 5m.")
    ] = "60s",
) -> Waited:
    """Wait until an instance is in a state, or in one that it does not leave by itself."""
    if wanted is State.UNKNOWN:
        raise UsageError("no instance is awaited to be Unknown", hint="wait for another state")
    host = await server.host(caller)
    found = await find(host, key)
    loop = asyncio.get_running_loop()
    end = loop.time() + min(seconds(longest), _LONGEST_WAIT_S)
    while found.state is not wanted and found.state not in _FINAL and loop.time() < end:
        await unless_ending(asyncio.sleep(_POLL_S), server.ending)
        found = await find(host, found.id)
    return Waited(state=found.state, timed_out=found.state is not wanted and loop.time() >= end)


def compresses(compression: dict[str, object] | None) -> bool:
    """Return whether a request asks for compressed memory."""
    return compression is not None and compression.get("enabled", False) is not False


def refuse(given: dict[str, object]) -> None:
    """Refuse features of hypeman that Coppice does not have, by the fields that ask for them.

    :raises NotSupported: a field is set
    """
    for name, value in given.items():
        if value:
            raise NotSupported(
                f"this server does not support {name!r}", hint="GET /capabilities lists what it supports"
            )


ROUTES: Final = [
    instances_list,
    instance_create,
    instance_get,
    instance_update,
    instance_delete,
    instance_start,
    instance_stop,
    instance_standby,
    instance_restore,
    instance_promote,
    instance_demote,
    instance_fork,
    instance_wait,
]
