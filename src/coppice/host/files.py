"""Use cases on names in a guest's file systems."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import AsyncIterator

from coppice.errors import GuestRefused
from coppice.host.guest import Guest
from coppice.model import FileEvent, FileStat
from coppice.requests import FileLsRequest, FileMkdirRequest, FileMvRequest, FileRmRequest, FileWatchRequest


class Files(Guest):
    """The operations on names. `cp` and the files' contents are in `guest`."""

    @contextlib.asynccontextmanager
    async def file_ls(self, request: FileLsRequest) -> AsyncIterator[AsyncIterator[FileStat]]:
        """Have the agent list the directory on a session port."""
        async with (
            self._session(request.instance) as session,
            contextlib.aclosing(session.listing(request.path)) as entries,
        ):
            yield entries

    async def file_mkdir(self, request: FileMkdirRequest) -> None:
        """Ask the agent on a session port."""
        async with self._session(request.instance) as session:
            await session.make_directory(request.path, mode=request.mode, parents=request.parents)

    async def file_mv(self, request: FileMvRequest) -> None:
        """Look whether the destination is a directory, then have the agent rename."""
        async with self._session(request.instance) as session:
            destination = request.destination
            with contextlib.suppress(GuestRefused):
                if (await session.stat(destination, follow=True)).kind == "d":
                    name = posixpath.basename(request.path.rstrip("/"))
                    destination = posixpath.join(destination, name)
            await session.move(request.path, destination, keep_existing=request.keep_existing)

    async def file_rm(self, request: FileRmRequest) -> None:
        """Ask the agent on a session port."""
        async with self._session(request.instance) as session:
            await session.remove(request.path, recursive=request.recursive, missing_ok=request.missing_ok)

    @contextlib.asynccontextmanager
    async def file_watch(self, request: FileWatchRequest) -> AsyncIterator[AsyncIterator[FileEvent]]:
        """Have the agent watch the path until the block ends."""
        async with (
            self._session(request.instance) as session,
            contextlib.aclosing(session.watching(request.path, recursive=request.recursive)) as events,
        ):
            yield events
