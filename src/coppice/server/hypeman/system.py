"""`/capabilities`, `/resources`, and the parts of hypeman that Coppice does not have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from litestar import HttpMethod, get, route
from litestar.handlers import HTTPRouteHandler

from coppice import __version__
from coppice.completion import in_thread
from coppice.errors import CoppiceError, NotSupported
from coppice.host import LocalBackend
from coppice.model import MachineSpec, Record, State
from coppice.requests import BudgetRequest, LsRequest
from coppice.server.context import TheCaller, TheServer
from coppice.vmm.driver import AgentDevice

_TAGS: Final = ["server"]
_API: Final = "0.3.0"  # the version of hypeman's document that the routes follow
_MISSING: Final = ("devices", "ingresses", "builds", "builders", "pushes")
_MISSING_PATHS: Final = {
    "reclaim of memory": "/resources/memory/reclaim",
}


class ServerInfo(Record, frozen=True, kw_only=True):
    """The program."""

    version: str = __version__
    api_version: str = _API


class HostInfo(Record, frozen=True, kw_only=True):
    """The machine."""

    os: str = "linux"
    arch: str = "amd64"


class Runtime(Record, frozen=True, kw_only=True):
    """A VMM."""

    name: str
    available: bool
    features: list[str]


class DefaultRuntime(Record, frozen=True, kw_only=True):
    """The VMM of new instances."""

    name: str
    available: bool


class NetworkInfo(Record, frozen=True, kw_only=True):
    """The network of instances. Each has a subnet and a gateway of its own."""

    model: str = "nat"
    guest_to_guest: bool = False


class ImagesInfo(Record, frozen=True, kw_only=True):
    """The platforms of images."""

    default_platform: str = "linux/amd64"
    platforms: tuple[str, ...] = ("linux/amd64",)


class Capabilities(Record, frozen=True, kw_only=True):
    """What a server can do."""

    server: ServerInfo = ServerInfo()
    host: HostInfo = HostInfo()
    runtimes: list[Runtime]
    default_runtime: DefaultRuntime
    network: NetworkInfo = NetworkInfo()
    images: ImagesInfo = ImagesInfo()
    features: tuple[str, ...] = ("instances", "images", "volumes", "exec", "logs", "templates", "fan-out")


class ResourceStatus(Record, frozen=True, kw_only=True):
    """One resource: capacity and use."""

    type: str
    capacity: int
    effective_limit: int
    allocated: int
    available: int
    oversub_ratio: float = 1.0
    source: str = "host"


class Allocation(Record, frozen=True, kw_only=True):
    """What one instance has."""

    instance_id: str
    instance_name: str
    cpu: int
    memory_bytes: int
    disk_bytes: int


class Resources(Record, frozen=True, kw_only=True):
    """The resources of the host."""

    cpu: ResourceStatus
    memory: ResourceStatus
    disk: ResourceStatus
    network: ResourceStatus
    allocations: list[Allocation]


@get("/capabilities", summary="What this server can do.", tags=_TAGS, opt={"scope": "resource:read"})
async def capabilities(server: TheServer, caller: TheCaller) -> Capabilities:
    """List the VMMs with their features, and the features of the server."""
    host = await server.host(caller)
    runtimes = [await _runtime(host, name) for name in sorted(each.name for each in host.rooms.drivers)]
    chosen = host.rooms.drivers.chosen.name
    available = next(each.available for each in runtimes if each.name == chosen)
    return Capabilities(runtimes=runtimes, default_runtime=DefaultRuntime(name=chosen, available=available))


async def _runtime(host: LocalBackend, name: str) -> Runtime:
    driver = host.rooms.drivers.named(name)
    try:
        await driver.manifest(MachineSpec())
        available = True
    except CoppiceError:  # it is not installed, or this host cannot run it
        available = False
    vsock = ["vsock"] if driver.capabilities.agent_device is AgentDevice.VSOCK else []
    return Runtime(name=name, available=available, features=["snapshots", "standby", "fork", "pause", *vsock])


@get("/resources", summary="Capacity and use.", tags=_TAGS, opt={"scope": "resource:read"})
async def resources(server: TheServer, caller: TheCaller) -> Resources:
    """Return the CPUs, the memory budget and the disk of the host, and what instances have."""
    host = await server.host(caller)
    used = await host.call(BudgetRequest())
    found = await host.call(LsRequest())
    live = [each for each in found if each.state is State.RUNNING]
    cpus = os.cpu_count() or 1
    of_all = await in_thread(host.rooms.store.instances)
    taken = sum(each.machine.cpus for each in of_all if each.state is State.RUNNING)
    speed = await in_thread(_uplink_bytes)
    disk = os.statvfs(host.home)
    size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    limit = used.memory_limit_bytes
    return Resources(
        cpu=ResourceStatus(
            type="cpu", capacity=cpus, effective_limit=cpus, allocated=taken, available=max(0, cpus - taken)
        ),
        memory=ResourceStatus(
            type="memory",
            capacity=_memory(),
            effective_limit=limit,
            allocated=used.memory_bytes,
            available=max(0, limit - used.memory_bytes),
            oversub_ratio=used.memory_overcommit,
            source="budget",
        ),
        disk=ResourceStatus(
            type="disk",
            capacity=size,
            effective_limit=max(0, size - used.disk_floor_bytes),
            allocated=size - free,
            available=max(0, free - used.disk_floor_bytes),
        ),
        network=ResourceStatus(
            type="network",
            capacity=speed,
            effective_limit=speed,
            allocated=0,  # no instance has a share of it for itself
            available=speed,
            source="detected" if speed else "unknown",
        ),
        allocations=[
            Allocation(
                instance_id=each.id,
                instance_name=each.name,
                cpu=each.machine.cpus,
                memory_bytes=each.machine.memory_bytes,
                disk_bytes=each.machine.overlay_bytes + sum(volume.size_bytes for volume in each.machine.volumes),
            )
            for each in live
        ],
    )


def _uplink_bytes() -> int:
    """Return the bytes per second of the card of the default route; 0 if the kernel does not know its speed."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        card, destination, *_ = line.split()
        if int(destination, 16) == 0:
            try:
                return max(0, int(Path(f"/sys/class/net/{card}/speed").read_text())) * 125_000
            except (OSError, ValueError):
                return 0
    return 0


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _missing(name: str, *paths: str) -> HTTPRouteHandler:
    @route(
        list(paths),
        http_method=[HttpMethod.GET, HttpMethod.POST, HttpMethod.PUT, HttpMethod.DELETE],
        name=name,
        include_in_schema=False,
    )
    async def missing() -> None:
        raise NotSupported(f"Coppice has no {name}", hint="GET /capabilities lists what it supports")

    return missing


ROUTES: Final[list[Any]] = [
    capabilities,
    resources,
    *(_missing(each, f"/{each}", f"/{each}/{{rest:path}}") for each in _MISSING),
    *(_missing(name, path) for name, path in _MISSING_PATHS.items()),
]
