"""`POST /call/{operation}` for every operation, and `/operations` for the operations under way."""

# No `from __future__ import annotations`: Litestar reads the annotations that `operation_route` makes.

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import msgspec
from litestar import Request as HttpRequest
from litestar import Response, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, HeaderParameter, JSONBody, QueryParameter
from litestar.response import ServerSentEventMessage

from coppice.completion import complete
from coppice.model import TreeNode, to_json
from coppice.requests import Request, TreeRequest
from coppice.requests.base import result_of
from coppice.server.auth import Caller
from coppice.server.context import IDEMPOTENCY, Server, TheCaller, TheServer, require
from coppice.server.document import EVENTS
from coppice.server.ending import unless_ending
from coppice.server.failures import failure_of
from coppice.server.running import Operation, OperationView
from coppice.server.sse import EventStream
from coppice.server.table import CALLS, WAITS, scope_of

OPERATION_HEADER = "coppice-operation"
ACCEPTED = {202: ResponseSpec(OperationView, description="The operation, which goes on.")}
KEEPALIVE_S = 15.0
"""A client hears from an operation at least this often, so that it can tell a lost connection."""

Accept = Annotated[
    str, HeaderParameter(name="accept", description="`text/event-stream`: send progress, then the result.")
]
Prefer = Annotated[
    str,
    HeaderParameter(name="prefer", description="`respond-async`: answer 202 with the operation at once (RFC 7240)."),
]

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name=IDEMPOTENCY,
        description="A text of the client's choice. The same request with the same key has no second effect, and gets "
        "the result of the first, for 24 hours.",
    ),
]


Begin = Callable[[Server, Caller, Any, str], Awaitable[Operation | Response[Any]]]
"""Begins the operation of a request's body and of the `key` in its path, or answers at once."""


def call_routes() -> list[HTTPRouteHandler]:
    """Return a route for each operation that is one call."""
    return [_route(name, kind) for name, kind in CALLS.items()]


def _route(name: str, kind: type[Request[Any]]) -> HTTPRouteHandler:
    reads = scope_of(name).endswith(":read") and name not in WAITS

    async def begin(server: Server, caller: Caller, data: Any, _: str) -> Operation | Response[Any]:
        if name in WAITS:
            return await server.begin_waiting(caller, data)
        if reads:
            read = (await server.host(caller)).call(data)
            return Response(await unless_ending(read, server.ending), status_code=200)
        return await server.begin(caller, data)

    return operation_route(
        f"/call/{name}",
        begin,
        body=kind,
        result=result_of(kind),
        name=f"call_{name}",
        operation_id=name,
        summary=(kind.__doc__ or "").split("\n\n")[0].replace("\n    ", " "),
        description=(kind.__doc__ or "").strip(),
        tags=["operations"],
        opt={"scope": scope_of(name)},
        responses=None if reads else ACCEPTED,
    )


def operation_route(path: str, begin: Begin, *, body: type, result: Any, **settings: Any) -> HTTPRouteHandler:
    """Return a POST route whose client can have the result, the events, or the operation itself.

    :param path: it may have a parameter `key`
    :param settings: those of `litestar.post`
    """

    async def carry_out(
        data: Any,
        request: HttpRequest[Caller, Any, Any],
        server: TheServer,
        caller: TheCaller,
        accept: str = "",
        prefer: str = "",
        idempotency: str | None = None,  # noqa: ARG001 - of the API document; the authentication reads it
        key: str = "",
    ) -> Response[Any]:
        begun = await begin(server, caller, data, key)
        return begun if isinstance(begun, Response) else await answer(request, begun, accept, prefer)

    carry_out.__annotations__ |= {
        "data": JSONBody[body],  # type: ignore[valid-type, misc]  # read by Litestar
        "request": HttpRequest,
        "accept": Accept,
        "prefer": Prefer,
        "idempotency": IdempotencyKey,
        "key": FromPath[str],
        "return": Response[result],
    }
    if "{key:" not in path:
        shown = inspect.signature(carry_out)
        parameters = [each for each in shown.parameters.values() if each.name != "key"]
        vars(carry_out)["__signature__"] = shown.replace(parameters=parameters)
    return post(path, status_code=200, **settings)(carry_out)


async def answer(
    request: HttpRequest[Caller, Any, Any], operation: Operation, accept: str, prefer: str
) -> Response[Any]:
    """Return the answer that a client wants of an operation: its result, its events, or the operation itself."""
    headers = {OPERATION_HEADER: operation.id}
    if "respond-async" in prefer:
        location = {"location": str(request.url_for("operation_get", key=operation.id))}
        return Response(operation.view(), status_code=202, headers=headers | location)
    if EVENTS in accept:
        return EventStream(_events(operation), headers=headers)
    return Response(await operation.result(), status_code=200, headers=headers)


async def _events(operation: Operation) -> AsyncIterator[ServerSentEventMessage]:
    """Yield progress, then one event `result` or `error`."""
    async for step in operation.steps(KEEPALIVE_S):
        if step is None:
            yield ServerSentEventMessage(comment="working", data=None)
        else:
            yield ServerSentEventMessage(event="progress", data=_text(step))
    try:
        value = await operation.result()
    except Exception as error:
        yield ServerSentEventMessage(event="error", data=_text(failure_of(error)[1]))
    else:
        yield ServerSentEventMessage(event="result", data=_text(value))


def _text(value: object) -> str:
    return to_json(value).decode()


Root = Annotated[str | None, QueryParameter(description="Return only this instance and its forks: name or id.")]


@get("/tree", summary="List instances as a tree.", tags=["instances"], opt={"scope": scope_of("tree")})
async def tree_get(server: TheServer, caller: TheCaller, instance: Root = None) -> list[TreeNode]:
    """Return the caller's instances with their memory. The forks of an instance follow it, one level
    deeper.
    """
    return await (await server.host(caller)).call(TreeRequest(instance=instance))


@get("/operations", summary="List the operations of this server since its start.", tags=["operations"])
async def operations_list(server: TheServer, caller: TheCaller) -> list[OperationView]:
    """Return the caller's operations, oldest first, without results. Those that its token does not allow are left
    out.
    """
    found = (each for each in server.operations.all(caller.owner) if caller.may(scope_of(each.name)))
    return [msgspec.structs.replace(each.view(), result=None) for each in found]


@get("/operations/{key:str}", name="operation_get", summary="Look up an operation.", tags=["operations"])
async def operation_get(key: FromPath[str], server: TheServer, caller: TheCaller) -> OperationView:
    """Return an operation with its progress, and its result when it has ended. The token needs the scope of the
    operation.
    """
    return _operation(server, caller, key).view()


@delete("/operations/{key:str}", summary="Cancel an operation.", tags=["operations"], status_code=200)
async def operation_cancel(key: FromPath[str], server: TheServer, caller: TheCaller) -> OperationView:
    """Cancel an operation, wait for its cleanup, and return its final state. An ended operation
    stays as it is. The token needs the scope of the operation.
    """
    operation = _operation(server, caller, key)
    await complete(server.operations.cancel(operation))
    return operation.view()


def _operation(server: Server, caller: Caller, key: str) -> Operation:
    """Return an operation that the caller may begin.

    :raises NotFound: the caller's owner has no such operation
    :raises Forbidden: the token lacks its scope
    """
    found = server.operations.get(key, caller.owner)
    require(caller, scope_of(found.name))
    return found
