"""Operations with an idempotency key: each is carried out once, however often it is requested.

Record first, act second: the key and the names of what will be made are recorded before the
operation begins. If the server is killed, a repeated request finishes the operation.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError, GuestRefused, OutcomeUnknown, kind_of
from coppice.host import LocalBackend
from coppice.model import ProgressSink, from_json
from coppice.requests import Request
from coppice.requests.base import result_of
from coppice.server.failures import Failure, failure_of, is_transient
from coppice.server.keys import Claim, Keys, digest_of, key_reused
from coppice.server.resuming import completed, generated, resume
from coppice.server.running import Operation, Operations, Work
from coppice.server.uploads import Uploads
from coppice.state.database import Database

Call = Callable[[], Awaitable[Any]]
_POLL_S: Final = 0.1  # another server process has the key, and sends no event when its operation ends


class Once:
    """The operations of a server that have keys. It is opened before the first request."""

    def __init__(self, operations: Operations, uploads: Uploads, made: Callable[[object], None]) -> None:
        """`made` is called with each new result, and not with a repeated one."""
        self._operations = operations
        self._uploads = uploads
        self._made = made
        self._under_way: dict[tuple[str | None, str], tuple[str, Operation]] = {}
        self._opened: Keys | None = None

    def open(self, database: Database) -> None:
        """Use an open database."""
        self._opened = Keys(database)

    @property
    def _keys(self) -> Keys:
        if self._opened is None:
            raise AssertionError("the server opens the keys before its first request")
        return self._opened

    async def require_content(self, owner: str | None, key: str, sha256: str, *, first: bool) -> None:
        """Compare the body that came with a key with the first one, or record that.

        :raises KeyReused: it is another one
        """
        if not await in_thread(partial(self._keys.has_content, owner, key, sha256, first=first)):
            raise key_reused(key)

    def begin(self, host: LocalBackend, key: str, request: Request[Any], work: Work) -> Operation:
        """Begin an operation, or return the one under way with the same key.

        :param work: calls `carry_out`
        :raises KeyReused: the key was sent with another request
        :raises TooManyOperations: the host's owner has too many running operations
        :raises Overloaded: all owners together have too many
        """
        place, digest = (host.owner, key), digest_of(request)
        if place in self._under_way:
            first, operation = self._under_way[place]
            if first != digest:
                raise key_reused(key)
            return operation
        operation = self._operations.start(request.operation, host.owner, work)
        self._under_way[place] = digest, operation
        operation.task.add_done_callback(lambda _: self._under_way.pop(place))
        return operation

    async def carry_out(
        self, host: LocalBackend, key: str, request: Request[Any], progress: ProgressSink, call: Call | None = None
    ) -> Any:
        """Carry out the operation, or return the result that was recorded with the key.

        :param call: carries the request out. Default: the host
        """
        names = await generated(host, request)
        claim = await self._claim(host.owner, key, request, names)
        if claim.status not in ("new", "begun"):
            return _replay(claim, request)
        named = completed(request, claim.generated)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if call is None:
                    named = await stack.enter_async_context(self._uploads.resolved(host.owner, named))
                    call = partial(host.call, named, progress)
                if claim.status == "new":
                    result = await call()
                else:
                    result = await resume(host, named, progress, claim.begun_at, call)
        except Exception as error:
            if is_transient(error):
                await complete(in_thread(self._keys.forget, host.owner, key))
            else:
                await complete(in_thread(self._keys.failed, host.owner, key, failure_of(error)[1]))
            raise
        self._made(result)
        await self._record(host.owner, key, result)
        return result

    async def _record(self, owner: str | None, key: str, result: Any) -> None:
        """Record a result."""
        await in_thread(self._keys.succeeded, owner, key, result)  # waits for the end, also if it is cancelled

    async def _claim(self, owner: str | None, key: str, request: Request[Any], names: dict[str, Any]) -> Claim:
        """Record the key. If another server carries out its operation, wait for the end."""
        while True:
            claim = await in_thread(self._keys.claim, owner, key, request, names)
            if claim.status != "elsewhere":
                return claim
            await asyncio.sleep(_POLL_S)


class _Recorded(Failure, frozen=True, kw_only=True):
    errno: int = 0


def _replay(claim: Claim, request: Request[Any]) -> Any:
    """Return the recorded result of an operation.

    :raises CoppiceError: the operation failed, with the same error as before
    :raises OutcomeUnknown: the result was too large to be kept
    """
    if claim.outcome is None:
        raise OutcomeUnknown(
            f"{request.operation} succeeded before, but its result was too large to be kept",
            hint="send the request again with a new key, if it may run twice",
        )
    if claim.status == "succeeded":
        return from_json(claim.outcome, result_of(type(request)))
    failure = msgspec.json.decode(claim.outcome, type=_Recorded)
    error: CoppiceError = kind_of(failure.code)(failure.message, hint=failure.hint)
    if isinstance(error, GuestRefused):
        error.errno = failure.errno
    raise error
