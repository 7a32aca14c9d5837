"""`POST /instances/{id}/forks` and `/snapshots/{id}/forks`: many forks in one call. hypeman has no such routes."""

# No `from __future__ import annotations`: Litestar reads the annotations that `_route` makes.

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from litestar import Request as HttpRequest
from litestar import Response, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, JSONBody

from coppice.host import LocalBackend
from coppice.model import ForkReport
from coppice.requests import FanOut, ForkRequest, SnapshotForkRequest, SnapshotInspectRequest
from coppice.requests.base import fields_of
from coppice.server.auth import Caller
from coppice.server.calls import ACCEPTED, Accept, IdempotencyKey, Prefer, answer
from coppice.server.context import TheCaller, TheServer
from coppice.server.hypeman.paths import find
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
    body = _body_of(kind, source)

    async def forks(
        key: str,
        data: Any,
        request: HttpRequest[Caller, Any, Any],
        server: TheServer,
        caller: TheCaller,
        accept: str,
        prefer: str,
        idempotency: str | None,  # noqa: ARG001 - of the API document; the authentication reads it
    ) -> Response[Any]:
        given = msgspec.structs.asdict(data) | {source: await resolve(await server.host(caller), key)}
        operation = await server.begin(caller, kind(**given))
        return await answer(request, operation, accept, prefer)

    forks.__annotations__ |= {
        "key": FromPath[str],
        "data": JSONBody[body],  # type: ignore[valid-type, misc]  # read by Litestar
        "request": HttpRequest,
        "accept": Accept,
        "prefer": Prefer,
        "idempotency": IdempotencyKey,
        "return": Response[ForkReport],
    }
    forks.__defaults__ = ("", "", None)
    operation = f"{source}_forks"
    return post(
        f"/{source}s/{{key:str}}/forks",
        name=operation,
        operation_id=operation,
        summary=f"Make forks of {'an' if source == 'instance' else 'a'} {source}, in parallel.",
        description="As the operation `fork`: each fork has its own result. With `Accept: text/event-stream` each is an "
        "event as soon as it is ready.",
        tags=[f"{source}s"],
        status_code=200,
        opt={"scope": scope_of("fork" if source == "instance" else "snapshot_fork")},
        responses=ACCEPTED,
    )(forks)


ROUTES: Final = [_route(ForkRequest, "instance", _instance), _route(SnapshotForkRequest, "snapshot", _snapshot)]
