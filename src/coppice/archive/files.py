"""Archives in files of the machine that makes the request: written to one, and read from one."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from coppice import stopping
from coppice.completion import complete, in_thread
from coppice.errors import NoSpace, UsageError
from coppice.linux.files import publish, temporary_beside
from coppice.model import ProgressSink
from coppice.model.archive import ExportSession
from coppice.model.progress import Meter

_CHUNK: Final = 1 << 19  # bytes; a server accepts frames of 1 MiB
_WRITER_S: Final = 2.0  # until a program must have opened a pipe for writing
_LOOK_S: Final = 0.2  # until the reader of a silent pipe looks whether its caller was cancelled


async def save(session: ExportSession, path: str, progress: ProgressSink) -> int:
    """Write an archive to a file, which only its owner may read; return its bytes.

    An existing file is replaced at the end. A pipe or device is written to directly.

    :raises UsageError: the path cannot be written
    :raises NoSpace: the disk is full
    """
    meter, written = Meter(progress, session.most_bytes, "export"), 0
    with _local(path, "write"), _output(Path(path)) as file:
        async for chunk in session:
            await in_thread(file.write, chunk)
            meter.moved(len(chunk))
            written += len(chunk)
        await in_thread(_sync, file)
    return written


@contextlib.contextmanager
def _output(path: Path) -> Iterator[BinaryIO]:
    if path.exists() and not path.is_file():
        # A pipe that nobody reads is refused: opening it would block.
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        with open(descriptor, "wb") as file:
            yield file
        return
    final = path.resolve()
    temporary = temporary_beside(final)
    try:
        with _unnamed(temporary) as file:
            yield file
            if not temporary.exists():
                # os.link follows the link in /proc only with a directory, which an absolute path ignores.
                os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=file.fileno())
        publish(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def _unnamed(path: Path) -> BinaryIO:
    """Open a new file without a name in the directory of `path`, so that a killed process leaves nothing.

    It is `path` itself if the file system has no such files.
    """
    try:
        descriptor = os.open(path.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return open(descriptor, "wb")


def _sync(file: BinaryIO) -> None:
    file.flush()
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        os.fsync(file.fileno())


async def content_of(path: str, progress: ProgressSink) -> AsyncGenerator[bytes, None]:
    """Yield the content of an archive in a file or pipe.

    :raises UsageError: the path cannot be read
    """
    with _local(path, "read"):
        descriptor = await complete(in_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        try:
            status = os.fstat(descriptor)
            meter = Meter(progress, status.st_size if stat.S_ISREG(status.st_mode) else None, "import")
            chunk = await (
                in_thread(_first, descriptor, path) if stat.S_ISFIFO(status.st_mode) else in_thread(_read, descriptor)
            )
            while chunk:
                yield chunk
                meter.moved(len(chunk))
                chunk = await in_thread(_read, descriptor)
        finally:
            os.close(descriptor)


def _first(descriptor: int, path: str) -> bytes:
    """Return the first bytes of a pipe.

    :raises UsageError: no program has opened it for writing
    """
    end = time.monotonic() + _WRITER_S
    while not select.select([descriptor], [], [], _LOOK_S)[0]:
        stopping.check()
        with contextlib.suppress(BlockingIOError):  # a program that has not written yet
            if data := os.read(descriptor, _CHUNK):
                return data
            if time.monotonic() > end:
                raise UsageError(f"no program writes to the pipe {path}", hint="start the one that writes the archive")
    return os.read(descriptor, _CHUNK)


def _read(descriptor: int) -> bytes:
    while not select.select([descriptor], [], [], _LOOK_S)[0]:
        stopping.check()
    return os.read(descriptor, _CHUNK)


@contextlib.contextmanager
def _local(path: str, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"no disk space is left for {path}", hint="free disk space, or choose another path"
            ) from error
        raise UsageError(
            f"cannot {verb} {path}: {error.strerror}", hint="give the path of a file of this machine"
        ) from error
