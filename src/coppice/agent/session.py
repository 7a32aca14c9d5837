"""A session with a guest: run commands, reach its sockets, read and write files and trees."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from coppice.agent import connection, paths, process
from coppice.agent.channel import Channel
from coppice.agent.collecting import chunks_of
from coppice.agent.connection import GuestConnection
from coppice.agent.process import Command, ExecSession
from coppice.agent.protocol import Fields, FrameType, encode_fields
from coppice.errors import CoppiceError, GuestError
from coppice.model import ExecResult, FileEvent, FileStat
from coppice.model.guest import MAX_COLLECTED, GuestCommand, Source, TerminalSize, Unpacked

_MAKE_PARENTS = 2
_FOLLOW_LINKS = 1
_CONTENTS = 1


class Session:
    """What can be done over a connection to an agent. Calls may overlap."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def give_up(self, error: CoppiceError) -> None:
        """End the session from this side. Each call of it, also one that has begun, raises `error`."""
        self._channel.give_up(error)

    # ---- commands ----

    def exec_stream(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: bool = False,
        size: TerminalSize = (24, 80),
        term: str | None = None,
        has_stdin: bool = True,
        timeout_s: float | None = None,
        command_id: str = "",
        detached: bool = False,
        keep_bytes: int | None = None,
        memory_bytes: int | None = None,
        processes: int | None = None,
    ) -> AbstractAsyncContextManager[ExecSession]:
        """Start a command. Leaving the block ends the command (SIGHUP, SIGKILL half a second
        later), unless it is detached.

        :param has_stdin: the caller sends the command's standard input; otherwise it is empty
        :param timeout_s: then the guest ends the command (SIGTERM, SIGKILL half a second later)
        :raises CommandNotStarted: the guest cannot start it; `errno` is that of the guest's kernel
        """
        command = Command(
            argv=tuple(argv),
            env=env or {},
            cwd=cwd,
            user=user,
            tty=tty,
            size=size,
            term=term,
            has_stdin=has_stdin,
            timeout_s=timeout_s,
            id=command_id,
            detached=detached,
            keep_bytes=keep_bytes,
            memory_bytes=memory_bytes,
            processes=processes,
        )
        return process.start(self._channel, command)

    async def exec(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: Source | None = None,
        timeout_s: float | None = None,
        memory_bytes: int | None = None,
        processes: int | None = None,
        max_output_bytes: int = MAX_COLLECTED,
    ) -> ExecResult:
        """Run a command to its end.

        :raises CommandNotStarted: the guest cannot start it
        :raises GuestTimeout: the command ran longer than `timeout_s`, and was ended
        :raises GuestError: the command wrote more than `max_output_bytes`, and was ended
        """
        started = self.exec_stream(
            argv,
            env=env,
            cwd=cwd,
            user=user,
            has_stdin=stdin is not None,
            timeout_s=timeout_s,
            memory_bytes=memory_bytes,
            processes=processes,
        )
        async with started as running:
            return await running.collect(stdin, max_output_bytes=max_output_bytes)

    def attach(
        self, command_id: str, *, offset: int = 0, output: bool = True, stdin: bool = False
    ) -> AbstractAsyncContextManager[ExecSession]:
        """Attach to a command, as `coppice.agent.process.attach`."""
        return process.attach(self._channel, command_id, offset=offset, output=output, stdin=stdin)

    async def commands(self) -> list[GuestCommand]:
        """Return the commands that run in the guest, and the latest that have ended."""
        return await process.commands(self._channel)

    def forget(self, command_id: str) -> None:
        """Have the agent forget a command that has ended and that no client is attached to."""
        process.forget(self._channel, command_id)

    # ---- sockets ----

    def connect(self, to: int | str) -> AbstractAsyncContextManager[GuestConnection]:
        """Connect to a port or a unix socket of the guest, as `coppice.agent.connection.connect`."""
        return connection.connect(self._channel, to)

    # ---- files ----

    async def read_file(self, path: str, *, max_bytes: int = MAX_COLLECTED) -> bytes:
        """Return the contents of a file.

        :raises GuestRefused: the file cannot be read
        :raises GuestError: the contents are larger than `max_bytes`
        """
        contents = bytearray()
        fields = encode_fields([(1, path), (2, 0)])  # from its beginning
        async for chunk in self._download(FrameType.FILE_READ, fields):
            contents += chunk
            if len(contents) > max_bytes:
                raise GuestError(
                    f"{path} is larger than {max_bytes} bytes", hint="read it as a stream, or copy it to a file"
                )
        return bytes(contents)

    async def write_file(self, path: str, data: Source, *, mode: int | None = None) -> None:
        """Write a file, completely or not at all. Missing parent directories are made.

        An existing file keeps its owner, and its mode if `mode` is None. A new one belongs to root
        and gets 0644.

        :raises GuestRefused: the file cannot be written
        """
        fields = encode_fields([(1, path), (2, mode), (5, _MAKE_PARENTS)])
        await self._upload(FrameType.FILE_WRITE, fields, data)

    async def stat(self, path: str, *, follow: bool = False) -> FileStat:
        """Return the status of a path; of a link itself unless `follow`.

        :raises GuestRefused: the path does not exist (`errno` ENOENT)
        """
        fields = encode_fields([(1, path), (2, _FOLLOW_LINKS if follow else 0)])
        return paths.stat_of(path, await self._channel.call(FrameType.FILE_STAT, fields))

    def listing(self, path: str) -> AsyncGenerator[FileStat, None]:
        """Yield the entries of a directory, as `coppice.agent.paths.listing`."""
        return paths.listing(self._channel, path)

    def watching(self, path: str, *, recursive: bool = False) -> AsyncGenerator[FileEvent, None]:
        """Yield the changes of a path, as `coppice.agent.paths.watching`."""
        return paths.watching(self._channel, path, recursive=recursive)

    async def make_directory(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        """Make a directory, as `coppice.agent.paths.make_directory`."""
        await paths.make_directory(self._channel, path, mode=mode, parents=parents)

    async def move(self, path: str, destination: str, *, keep_existing: bool = False) -> None:
        """Rename a path, as `coppice.agent.paths.move`."""
        await paths.move(self._channel, path, destination, keep_existing=keep_existing)

    async def remove(self, path: str, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a path, as `coppice.agent.paths.remove`."""
        await paths.remove(self._channel, path, recursive=recursive, missing_ok=missing_ok)

    # ---- trees ----

    def tree_out(self, path: str, *, contents: bool = False) -> AsyncIterator[bytes]:
        """Yield the records of a file or tree. The guest packs it, so it is not trustworthy.

        :param contents: pack the entries of the directory instead of the directory itself
        :raises GuestRefused: the path cannot be read
        """
        fields = encode_fields([(1, path), (2, _CONTENTS if contents else 0)])
        return self._download(FrameType.TREE_OUT, fields)

    async def tree_in(self, directory: str, records: Source) -> Unpacked:
        """Make a tree below a directory. No entry can leave the directory.

        :raises GuestRefused: an entry cannot be made; the entries before it remain
        """
        reply = await self._upload(FrameType.TREE_IN, encode_fields([(1, directory)]), records, marks_its_end=True)
        return Unpacked(members=reply.integer(1), content_bytes=reply.integer(2))

    # ---- transfers ----

    async def _download(self, kind: FrameType, fields: bytes) -> AsyncIterator[bytes]:
        stream = await self._channel.open(kind, fields)
        try:
            async for chunk in stream.data():
                yield chunk
        finally:
            stream.abandon()

    async def _upload(self, kind: FrameType, fields: bytes, source: Source, *, marks_its_end: bool = False) -> Fields:
        """Send data and return the fields of the reply.

        :param marks_its_end: data that is cut off is an error for the agent, which then removes what is incomplete
        """
        stream = await self._channel.open(kind, fields)
        try:
            try:
                async for chunk in chunks_of(source):
                    await stream.send_data(FrameType.DATA, chunk)
                    if stream.ended:
                        break
            except Exception:
                if marks_its_end:
                    with contextlib.suppress(CoppiceError):
                        await stream.send(FrameType.DATA_EOF)
                        await stream.reply()
                raise
            await stream.send(FrameType.DATA_EOF)
            return await stream.reply()
        finally:
            stream.abandon()
