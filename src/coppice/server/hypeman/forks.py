"""`POST /instances/{id}/forks` and `/snapshots/{id}/forks`: many forks in one call. hypeman has no such routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from litestar.handlers import HTTPRouteHandler

from coppice.host import LocalBackend
from coppice.model import ForkReport
from coppice.requests import FanOut, ForkRequest, SnapshotForkRequest, SnapshotInspectRequest
from coppice.requests.base import fields_of
from coppice.server.auth import Caller
from coppice.server.calls import ACCEPTED, operation_route
from coppice.server.context import Server
from coppice.server.hypeman.paths import find
from coppice.server.running import Operation
from coppice.server.table import scope_of

_Resolve = Callable[[LocalBackend, str], Awaitable[str]]


async def _instance(host: LocalBackend, key: str) -> str:
    return (await find(host, key)).id


async def _snapshot(host: LocalBackend, key: str) -> str:
    return (await host.call(SnapshotInspectRequest(snapshot=key))).snapshot.id


def _body_of(kind: type[FanOut], source: str) -> type[msgspec.Struct]:
    """Return the body of a route: the parameters of a request, but for its source, which is in the path. The target
    has its name in the hypeman API.
    """
    defaults = {each.name: each for each in msgspec.structs.fields(kind)}
    fields = [
        (name, annotation, defaults[name].default)
        if defaults[name].default is not msgspec.NODEFAULT
        else (name, annotation, msgspec.field(default_factory=defaults[name].default_factory))
        for name, annotation in fields_of(kind).items()
        if name != source
    ]
    return msgspec.defstruct(
        f"{source.capitalize()}Forks",
        fields,
        kw_only=True,
        frozen=True,
        forbid_unknown_fields=True,
        rename={"target": "target_state"},
        namespace={"__doc__": "How many forks, and of which kind."},
    )


def _route(kind: type[FanOut], source: str, resolve: _Resolve) -> HTTPRouteHandler:
    async def begin(server: Server, caller: Caller, data: Any, key: str) -> Operation:
        given = msgspec.structs.asdict(data) | {source: await resolve(await server.host(caller), key)}
        return await server.begin(caller, kind(**given))

    operation = f"{source}_forks"
    return operation_route(
        f"/{source}s/{{key:str}}/forks",
        begin,
        body=_body_of(kind, source),
        result=ForkReport,
        name=operation,
        operation_id=operation,
        summary=f"Make forks of {'an' if source == 'instance' else 'a'} {source}, in parallel.",
        description="As the operation `fork`: each fork has its own result. With `Accept: text/event-stream` each is an "
        "event as soon as it is ready.",
        tags=[f"{source}s"],
        opt={"scope": scope_of("fork" if source == "instance" else "snapshot_fork")},
        responses=ACCEPTED,
    )


ROUTES: Final = [_route(ForkRequest, "instance", _instance), _route(SnapshotForkRequest, "snapshot", _snapshot)]
