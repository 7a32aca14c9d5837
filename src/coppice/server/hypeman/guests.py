"""What goes on in an instance, in the hypeman API: logs, stat, stats."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from litestar import get
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.response import ServerSentEventMessage
from msgspec import UNSET

from coppice.completion import in_thread
from coppice.errors import GuestRefused
from coppice.host import LocalBackend
from coppice.model import PAGE_SIZE, Instance, Traffic
from coppice.model.events import Event
from coppice.requests import EventsRequest, LogsRequest, StatRequest, StatsRequest
from coppice.server.context import Server, TheCaller, TheServer
from coppice.server.document import EVENTS
from coppice.server.ending import following
from coppice.server.hypeman.instances import READ, TAGS
from coppice.server.hypeman.paths import find, moment
from coppice.server.hypeman.wire import InstanceStats, PathInfo
from coppice.server.sse import EventStream
from coppice.state.event_schema import KEPT

_TICKS: Final = float(os.sysconf("SC_CLK_TCK"))  # per second, in /proc/PID/stat
_UTIME, _VSIZE, _RSS = 11, 20, 21  # fields of /proc/PID/stat after the command, proc(5)
_NONE: Final = Traffic(received_bytes=0, sent_bytes=0, counted_by="host")
_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR)
_SOURCES: Final[dict[str, Literal["console", "vmm"]]] = {"app": "console", "vmm": "vmm"}

KEEPALIVE_S: Final = 15.0
"""A client hears from a silent log at least this often, so that a proxy keeps the connection."""
_SILENCE: Final = ServerSentEventMessage(comment="no news", data=None)

Source = Literal["app", "vmm", "hypeman"]


@get("/instances/{key:str}/logs", summary="Read or follow a log.", tags=TAGS, opt=READ, media_type=EVENTS)
async def instance_logs(
    key: FromPath[str],
    server: TheServer,
    caller: TheCaller,
    origin: Annotated[
        Source,
        QueryParameter(name="source", description="app: the console; vmm: the VMM's log; hypeman: its events."),
    ] = "app",
    tail: Annotated[int, QueryParameter(description="How many of the last lines to send first.", ge=0)] = 100,
    follow: FromQuery[bool] = False,
) -> EventStream:
    """Send the lines of a log as events; the data of each is a JSON string."""
    host = await server.host(caller)
    found = await find(host, key)
    request = LogsRequest(instance=found.id, source=_SOURCES.get(origin, "console"), tail=tail, follow=follow)
    if origin == "hypeman":
        return EventStream(_history(server, host, found, min(tail, KEPT), follow=follow))
    stream = host.stream(request)
    lines = await stream.__aenter__()  # a missing log is an error of the request, not of the stream
    return EventStream(_events(lines, stream, server.ending))


async def _history(
    server: Server, host: LocalBackend, found: Instance, tail: int, *, follow: bool
) -> AsyncIterator[ServerSentEventMessage]:
    """Yield what happened to an instance, as lines."""
    last = await in_thread(host.rooms.store.events.newest)
    async with host.stream(EventsRequest(after=0)) as events:
        kept = deque([each async for each in events if each.instance == found.id and each.id <= last], maxlen=tail)
    for event in kept:
        yield _line(event)
    if not follow:
        return
    async with (
        host.stream(EventsRequest(after=last, follow=True)) as events,
        contextlib.aclosing(following(events, server.ending, every_s=KEEPALIVE_S)) as coming,
    ):
        async for each in coming:
            if each is None:
                yield _SILENCE
            elif each.instance == found.id:
                yield _line(each)


def _line(event: Event) -> ServerSentEventMessage:
    words = (moment(event.at).isoformat(timespec="milliseconds"), event.kind, event.state or "", event.detail)
    return ServerSentEventMessage(data=msgspec.json.encode(" ".join(each for each in words if each)).decode())


async def _events(
    lines: AsyncIterator[bytes], stream: object, ending: asyncio.Event
) -> AsyncIterator[ServerSentEventMessage]:
    try:
        async with contextlib.aclosing(following(lines, ending, every_s=KEEPALIVE_S)) as found:
            async for line in found:
                if line is None:
                    yield _SILENCE
                    continue
                text = line.decode(errors="replace").rstrip("\r\n")
                yield ServerSentEventMessage(data=msgspec.json.encode(text).decode())
    finally:
        await stream.__aexit__(None, None, None)  # type: ignore[attr-defined]


@get("/instances/{key:str}/stat", summary="Look at a path in the guest.", tags=TAGS, opt=READ)
async def instance_stat(
    key: FromPath[str],
    server: TheServer,
    caller: TheCaller,
    place: Annotated[str, QueryParameter(name="path", description="An absolute path in the guest.")],
    follow_links: FromQuery[bool] = False,
) -> PathInfo:
    """Say whether a path exists in a running guest, and what it is."""
    host = await server.host(caller)
    found = await find(host, key)
    try:
        status = await host.call(StatRequest(instance=found.id, path=place, follow_links=follow_links))
    except GuestRefused as error:
        if not error.errno:
            raise
        return PathInfo(exists=False, error=UNSET if error.errno in _ABSENT else error.message)
    return PathInfo(
        exists=True,
        is_dir=status.kind == "d",
        is_file=status.kind == "f",
        is_symlink=status.kind == "l",
        link_target=status.link_target or msgspec.UNSET,
        mode=status.mode,
        size=status.size_bytes,
    )


@get("/instances/{key:str}/stats", summary="What an instance uses.", tags=TAGS, opt=READ)
async def instance_stats(key: FromPath[str], server: TheServer, caller: TheCaller) -> InstanceStats:
    """Return CPU time and memory of an instance's VMM, and the bytes that crossed its NIC. A counter is null if
    nothing counts it: only the guest does on some networks, and it may not answer.
    """
    host = await server.host(caller)
    return await _stats(host, await find(host, key))


async def _stats(host: LocalBackend, found: Instance) -> InstanceStats:
    """Return what the present VMM of an instance has used: nothing if there is none."""
    cpu, virtual, resident = 0.0, 0, 0
    traffic: Traffic | None = _NONE
    if found.vmm is not None:
        cpu, virtual, resident = await in_thread(_process, found.vmm.pid)
        reports = await host.call(StatsRequest(instance=found.id))
        traffic = next((report.traffic for report in reports.values()), None)
    size = found.machine.memory_bytes
    return InstanceStats(
        instance_id=found.id,
        instance_name=found.name,
        cpu_seconds=cpu,
        memory_rss_bytes=resident,
        memory_vms_bytes=virtual,
        network_rx_bytes=traffic.received_bytes if traffic else None,
        network_tx_bytes=traffic.sent_bytes if traffic else None,
        allocated_vcpus=found.machine.cpus,
        allocated_memory_bytes=size,
        memory_utilization_ratio=resident / size,
    )


def _process(pid: int) -> tuple[float, int, int]:
    """Return the CPU seconds and the virtual and resident bytes of a process; zeros if it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0, 0
    cpu = (int(fields[_UTIME]) + int(fields[_UTIME + 1])) / _TICKS
    return cpu, int(fields[_VSIZE]), int(fields[_RSS]) * PAGE_SIZE


ROUTES: Final = [instance_logs, instance_stat, instance_stats]
