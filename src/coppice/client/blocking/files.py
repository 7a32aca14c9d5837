# Written by tools/generate_client.py from client/aio: change that, then run it.

"""The manager of a machine's files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from coppice.client.aio.files import AsyncFiles
from coppice.client.blocking.twin import Twin
from coppice.model import FileEvent, FileStat

if TYPE_CHECKING:
    pass


class Files(Twin[AsyncFiles]):
    """The files and directories of one machine."""

    def ls(self, path: str) -> Iterator[FileStat]:
        """Yield the entries of a directory in a Running guest, in the order of its file system.

        They arrive as the guest reads them, however many there are. Links are described themselves.
        Bytes of names that are not UTF-8 become surrogate escapes, and from a server U+FFFD.

        :param path: A path in the guest.
        :raises GuestRefused: the path is not a directory (`errno` ENOTDIR), or does not exist
        """
        return self._portal.iterate(self._twin.ls(path))

    def mkdir(self, path: str, *, parents: bool = False, mode: int = 493) -> None:
        """Make a directory in a Running guest.

        :param path: A path in the guest.
        :param parents: Make missing parents too, and accept a directory that exists.
        :param mode: Permission bits.
        :raises GuestRefused: it exists (`errno` EEXIST), or cannot be made
        """
        self._portal.call(self._twin.mkdir(path, parents=parents, mode=mode))

    def mv(self, path: str, destination: str, *, keep_existing: bool = False) -> None:
        """Rename a file or directory in a Running guest, atomically. An existing file is replaced.

        :param path: A path in the guest.
        :param destination: The new path, with its name; or an existing directory for it.
        :param keep_existing: Fail if the new path exists.
        :raises GuestRefused: it does not exist, or the destination is on another file system
            (`errno` EXDEV), a directory with content, or kept
        """
        self._portal.call(self._twin.mv(path, destination, keep_existing=keep_existing))

    def rm(self, path: str, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file, a link or an empty directory in a Running guest.

        :param path: A path in the guest.
        :param recursive: Remove the content of a directory too. Links are not followed.
        :param missing_ok: Succeed if the path does not exist.
        :raises GuestRefused: it does not exist, has content (`errno` ENOTEMPTY), or cannot be
            removed
        """
        self._portal.call(self._twin.rm(path, recursive=recursive, missing_ok=missing_ok))

    def watch(self, path: str, *, recursive: bool = False) -> Iterator[FileEvent]:
        """Yield the changes of a file, or of the entries of a directory, in a Running guest (inotify).

        The first event is `watching`: all later changes are reported. If the guest's kernel had to
        drop some, there is the event `overflow`. The last event is `gone`: the path itself was
        removed or moved.

        :param path: A path in the guest.
        :param recursive: Watch all directories below too. An entry of a new directory may be
            reported twice.
        :raises GuestRefused: the path does not exist, or has more directories than can be watched
            (`errno` ENOSPC)
        """
        return self._portal.iterate(self._twin.watch(path, recursive=recursive))
