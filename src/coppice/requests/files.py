"""Requests about names in a guest's file systems: list, make, move, remove, watch."""

from collections.abc import AsyncIterator
from typing import Annotated

from msgspec import Meta

from coppice.model import FileEvent, FileStat
from coppice.names import check_mode
from coppice.requests.base import InstanceRequest, StreamRequest
from coppice.requests.guest import GuestPath


class FileLsRequest(
    InstanceRequest[AsyncIterator[FileStat]], StreamRequest[AsyncIterator[FileStat]], frozen=True, kw_only=True
):
    """Yield the entries of a directory in a Running guest, in the order of its file system.

    They arrive as the guest reads them, however many there are. Links are described themselves. Bytes of
    names that are not UTF-8 become surrogate escapes, and from a server U+FFFD.

    :raises GuestRefused: the path is not a directory (`errno` ENOTDIR), or does not exist
    """

    path: GuestPath


class FileMkdirRequest(InstanceRequest[None], frozen=True, kw_only=True):
    """Make a directory in a Running guest.

    :raises GuestRefused: it exists (`errno` EEXIST), or cannot be made
    """

    path: GuestPath
    parents: Annotated[bool, Meta(description="Make missing parents too, and accept a directory that exists.")] = False
    mode: Annotated[int, Meta(description="Permission bits.")] = 0o755

    def check(self) -> None:
        """Also check the mode."""
        super().check()
        check_mode(self.mode)


class FileMvRequest(InstanceRequest[None], frozen=True, kw_only=True):
    """Rename a file or directory in a Running guest, atomically. An existing file is replaced.

    :raises GuestRefused: it does not exist, or the destination is on another file system (`errno` EXDEV),
        a directory with content, or kept
    """

    path: GuestPath
    destination: Annotated[str, Meta(description="The new path, with its name; or an existing directory for it.")]
    keep_existing: Annotated[bool, Meta(description="Fail if the new path exists.")] = False


class FileRmRequest(InstanceRequest[None], frozen=True, kw_only=True):
    """Remove a file, a link or an empty directory in a Running guest.

    :raises GuestRefused: it does not exist, has content (`errno` ENOTEMPTY), or cannot be removed
    """

    path: GuestPath
    recursive: Annotated[bool, Meta(description="Remove the content of a directory too. Links are not followed.")] = (
        False
    )
    missing_ok: Annotated[bool, Meta(description="Succeed if the path does not exist.")] = False


class FileWatchRequest(
    InstanceRequest[AsyncIterator[FileEvent]], StreamRequest[AsyncIterator[FileEvent]], frozen=True, kw_only=True
):
    """Yield the changes of a file, or of the entries of a directory, in a Running guest (inotify).

    The first event is `watching`: all later changes are reported. If the guest's kernel had to drop some,
    there is the event `overflow`. The last event is `gone`: the path itself was removed or moved.

    :raises GuestRefused: the path does not exist, or has more directories than can be watched (`errno`
        ENOSPC)
    """

    path: GuestPath
    recursive: Annotated[
        bool,
        Meta(description="Watch all directories below too. An entry of a new directory may be reported twice."),
    ] = False
