"""A session with a guest: run commands, read and write files, pack and unpack trees. One thing at a time."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

import msgspec

from coppice.errors import GuestError, GuestProtocolError
from coppice.guest import process
from coppice.guest.channel import Channel, unexpected
from coppice.guest.process import MAX_COLLECTED, Command, ExecSession, OutputSink, Source, TerminalSize, chunks_of
from coppice.guest.protocol import (
    WINDOW_SIZE,
    Fields,
    FrameType,
    encode_fields,
    encode_frame,
    encode_request,
    encode_stream,
    integer32,
)
from coppice.model import ExecResult, FileStat, Record

DEFAULT_SIZE: Final[TerminalSize] = (24, 80)

_APPEND, _MAKE_PARENTS = 1, 2
_FOLLOW_LINKS = 1
_CONTENTS, _HOLES = 1, 2
_MAKE_DIRECTORY = 1
_KEEPS_HOLES = 1  # a capability


class Unpacked(Record, frozen=True, kw_only=True):
    """What a guest has unpacked."""

    members: int
    content_bytes: int


class Session:
    """An agent port that is ours. Methods must not overlap: the next begins when the one before has ended."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    # ---- commands ----

    def exec_stream(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: bool = False,
        size: TerminalSize | None = None,
        term: str | None = None,
        has_stdin: bool = True,
        timeout_s: float | None = None,
    ) -> AbstractAsyncContextManager[ExecSession]:
        """Start a command and talk to it; leaving the block ends the command (SIGHUP, SIGKILL half a second later).

        :param has_stdin: its standard input is ours; else it is empty
        :param timeout_s: after so long the guest ends the command: SIGTERM, and SIGKILL half a second later
        :raises CommandNotStarted: `errno` is that of the guest's kernel
        """
        command = Command(
            argv=tuple(argv),
            env=env or {},
            cwd=cwd,
            user=user,
            tty=tty,
            size=size or DEFAULT_SIZE,
            term=term,
            has_stdin=has_stdin,
            timeout_s=timeout_s,
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
        on_stdout: OutputSink | None = None,
        on_stderr: OutputSink | None = None,
        max_output_bytes: int = MAX_COLLECTED,
    ) -> ExecResult:
        """Run a command to its end. What has a sink goes there and is not collected.

        :raises CommandNotStarted: it cannot be started
        :raises GuestTimeout: it ran longer than `timeout_s`, and was ended
        :raises GuestError: it wrote more than `max_output_bytes`, and was ended
        """
        started = self.exec_stream(argv, env=env, cwd=cwd, user=user, has_stdin=stdin is not None, timeout_s=timeout_s)
        async with started as running:
            return await running.collect(
                stdin, on_stdout=on_stdout, on_stderr=on_stderr, max_output_bytes=max_output_bytes
            )

    # ---- files ----

    async def read_stream(self, path: str, *, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """The contents of a file, in chunks.

        :raises GuestRefused: it cannot be read
        """
        if length == 0:
            return
        fields = encode_fields([(1, path), (2, offset), (3, length)])
        async for chunk in self._download(FrameType.FILE_READ, fields):
            yield chunk

    async def read_file(
        self, path: str, *, offset: int = 0, length: int | None = None, max_bytes: int = MAX_COLLECTED
    ) -> bytes:
        """The contents of a file, whole.

        :raises GuestRefused: it cannot be read
        :raises GuestError: it is larger than `max_bytes`
        """
        contents = bytearray()
        async for chunk in self.read_stream(path, offset=offset, length=length):
            contents += chunk
            if len(contents) > max_bytes:
                raise GuestError(
                    f"{path} is larger than {max_bytes} bytes", hint="read it as a stream, or copy it to a file"
                )
        return bytes(contents)

    async def write_file(
        self,
        path: str,
        data: Source,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        append: bool = False,
        make_parents: bool = True,
    ) -> None:
        """Write a file; it is there whole or not at all, unless `append`. Missing parent directories are made.

        Where `mode`, `uid` or `gid` is None, an existing file keeps its own; a new one is 0644 and root's.

        :raises GuestRefused: it cannot be written
        """
        flags = (_APPEND if append else 0) | (_MAKE_PARENTS if make_parents else 0)
        fields = encode_fields([(1, path), (2, mode), (3, uid), (4, gid), (5, flags)])
        await self._upload(FrameType.FILE_WRITE, fields, data)

    async def stat(self, path: str, *, follow: bool = False) -> FileStat:
        """What stands at a path; of a link the link itself unless `follow`.

        :raises GuestRefused: nothing does (`errno` ENOENT)
        """
        fields = encode_fields([(1, path), (2, _FOLLOW_LINKS if follow else 0)])
        await self._channel.begin(encode_request(FrameType.FILE_STAT, fields))
        reply = await self._channel.reply()
        mtime_ns = reply.integer(6)
        target = reply.raw(7)
        try:
            return msgspec.convert(
                {
                    "path": path,
                    "kind": reply.text(1),
                    "size_bytes": reply.integer(2),
                    "mode": reply.integer(3) & 0o7777,
                    "uid": reply.integer(4),
                    "gid": reply.integer(5),
                    "mtime": (mtime_ns - (1 << 64) if mtime_ns >> 63 else mtime_ns) / 1e9,
                    "link_target": None if target is None else os.fsdecode(target),
                },
                FileStat,
            )
        except msgspec.ValidationError as error:
            raise GuestProtocolError(
                f"the guest's answer about {path} makes no sense: {error}", hint="start the machine anew"
            ) from error

    # ---- trees ----

    @property
    def keeps_holes(self) -> bool:
        """Whether `tar_in` understands files with holes, as agents did not always; known when the first request has been answered."""
        return bool(self._channel.capabilities & _KEEPS_HOLES)

    def tar_out(self, path: str, *, contents: bool = False, holes: bool = False) -> AsyncIterator[bytes]:
        """A tar stream of a file or tree, as the guest packs it: not to be trusted.

        :param contents: the members of the directory rather than the directory itself
        :param holes: leave out the holes of files, and say where they are (GNU tar's sparse format 0.1); older agents send them as zeros
        :raises GuestRefused: it cannot be read
        """
        fields = encode_fields([(1, path), (2, (_CONTENTS if contents else 0) | (_HOLES if holes else 0))])
        return self._download(FrameType.TAR_OUT, fields)

    async def tar_in(self, directory: str, archive: Source, *, make: bool = False) -> Unpacked:
        """Unpack a tar stream below a directory, which no member leaves.

        :param make: make the directory (not its parents) if it is not there
        :raises GuestRefused: a member cannot be made; those before it are there
        """
        fields = encode_fields([(1, directory), (2, _MAKE_DIRECTORY if make else 0)])
        reply = await self._upload(FrameType.TAR_IN, fields, archive)
        return Unpacked(members=reply.integer(1), content_bytes=reply.integer(2))

    # ---- transfers ----

    async def _download(self, frame_type: FrameType, fields: bytes) -> AsyncIterator[bytes]:
        await self._channel.begin(encode_request(frame_type, fields))
        while (frame := await self._channel.receive()).type == FrameType.DATA:
            yield frame.payload
        self._channel.final(frame)

    async def _upload(self, frame_type: FrameType, fields: bytes, source: Source) -> Fields:
        await self._channel.begin(encode_request(frame_type, fields))
        window = WINDOW_SIZE
        async for chunk in chunks_of(source):
            view = memoryview(chunk)
            while view:
                while window == 0:
                    window += await self._credit()
                size = min(len(view), window)
                await self._channel.send(encode_stream(FrameType.DATA, view[:size]))
                window -= size
                view = view[size:]
        await self._channel.send(encode_frame(FrameType.DATA_EOF))
        return await self._channel.reply()

    async def _credit(self) -> int:
        """How much more may be sent; an error that comes instead is raised."""
        frame = await self._channel.receive()
        if frame.type == FrameType.WINDOW:
            return integer32(frame.payload)
        self._channel.final(frame)
        raise unexpected(frame)
