"""Files that clients send for a request that names files, such as `image_import`.

A client sends each file or directory over the WebSocket `/stream/upload`, and then names it in its
request as `upload:SHA256`. An upload exists while the client keeps its connection or a request uses it.
It is below `uploads/` of the data directory, in a directory that this process has locked: what a
killed server leaves is removed by the next one. No other path of a request is ever opened.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from coppice.completion import complete, in_thread
from coppice.content.store import ContentStore
from coppice.errors import CoppiceError, NotFound, NotSupported, UsageError
from coppice.requests import Request
from coppice.requests.base import paths_of
from coppice.state.layout import Layout

R = TypeVar("R", bound=Request[Any])
PREFIX: Final = "upload:"
_NAME_MAX: Final = 255


class Upload:
    """One file or directory of a client."""

    def __init__(self, owner: str | None, directory: Path, name: str) -> None:
        self.token = f"{PREFIX}{secrets.token_urlsafe(18)}"
        self.owner = owner
        self.directory = directory
        self.name = name
        self.complete = False
        self.by_content = self.token  # the name for clients: by digest, since a repeated request has the same
        self.holders = 1
        self.closing = ExitStack()

    @property
    def path(self) -> Path:
        """The path of the content. It has the name that it has on the client's machine."""
        return self.directory / self.name


class Uploads:
    """The uploads of a server. They are lost with it."""

    def __init__(self) -> None:
        self._uploads: dict[str, Upload] = {}
        self._store: ContentStore | None = None

    async def open(self, home: Path) -> None:
        """Use a data directory, and remove what killed servers left there."""
        self._store = ContentStore(Layout(home).uploads)
        await in_thread(self._store.sweep)

    @asynccontextmanager
    async def make(self, owner: str | None, name: str) -> AsyncIterator[Upload]:
        """Make an empty upload. At the end of the block it is removed, or when no request uses it.

        :raises UsageError: the name cannot be that of a file
        """
        if self._store is None:
            raise AssertionError("the server opens the uploads before its first request")
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name or _too_long(name):  # noqa: PTH119
            raise UsageError(f"an upload cannot have the name {name[:80]!r}", hint="send the last part of its path")
        with ExitStack() as stack:
            stage = await complete(in_thread(stack.enter_context, self._store.staging()))
            upload = Upload(owner, stage, name)
            upload.closing = stack.pop_all()
        self._uploads[upload.token] = upload
        try:
            yield upload
        finally:
            await self._release(upload)

    async def _release(self, upload: Upload) -> None:
        upload.holders -= 1
        if not upload.holders:
            del self._uploads[upload.token]
            await complete(in_thread(upload.closing.close))

    @asynccontextmanager
    async def resolved(self, owner: str | None, request: R) -> AsyncIterator[R]:
        """Yield a request that names the uploads' paths. They exist until the end of the block.

        :raises NotSupported: the request names another file
        :raises NotFound: the owner has no such upload
        """
        named = {name: str(getattr(request, name)) for name in paths_of(type(request)) if getattr(request, name)}
        async with AsyncExitStack() as held:
            found = {}
            for name, token in named.items():
                found[name] = self._get(owner, request, name, token)
                found[name].holders += 1
                held.push_async_callback(self._release, found[name])
            with _without_paths(list(found.values())):
                yield msgspec.structs.replace(request, **{name: str(each.path) for name, each in found.items()})

    def _get(self, owner: str | None, request: Request[Any], name: str, token: str) -> Upload:
        if not token.startswith(PREFIX):
            raise NotSupported(
                f"a server does not read the {name} of {request.operation} from its own disk",
                hint="send the file: `coppice --host URL` does, and so does `coppice.connect`",
            )
        complete = (each for each in self._uploads.values() if each.owner == owner and each.complete)
        upload = next((each for each in complete if token in (each.token, each.by_content)), None)
        if upload is None:
            raise NotFound(f"there is no upload {token!r}", hint="repeat the command, which sends the file again")
        return upload


def _too_long(name: str) -> bool:
    return len(os.fsencode(name)) > _NAME_MAX


@contextmanager
def _without_paths(uploads: list[Upload]) -> Iterator[None]:
    """Name the uploads in errors as the client named them, not by paths of the server."""
    try:
        yield
    except CoppiceError as error:
        for each in uploads:
            error.reword(str(each.path), each.by_content)
        raise
