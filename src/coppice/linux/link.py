"""Share an immutable file by a hard link, else by a copy with the reason for it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

from coppice.errors import HostCannot, IntegrityError
from coppice.linux.clone import clone_file
from coppice.linux.files import os_errors
from coppice.model import Sharing

IMMUTABLE = 0o444

_REASONS = {
    errno.EXDEV: "source and destination are on different file systems or mounts",
    errno.EPERM: "the file system has no hard links, or fs.protected_hardlinks forbids one to a file of another user",
    errno.EMLINK: "the source has as many hard links as its file system allows",
    errno.ENOTSUP: "the file system does not support hard links",
}


class LinkResult(NamedTuple):
    """How the destination was made.

    `reason` is empty for a hard link, else it says why a copy was made.
    """

    sharing: Sharing
    reason: str
    bytes_written: int


def link_or_copy(source: Path | str, destination: Path | str) -> LinkResult:
    """Give `destination` the contents of an immutable file, by hard link if possible; its mode is
    0444 on return.

    Falls back to `clone_file` on EXDEV, EPERM, EMLINK and ENOTSUP. A link is verified: it must be
    the inode that `source` named before. Links are not synced: after a power loss the journal rolls
    the fork back.

    Raises Refused if `destination` exists, IntegrityError if `source` is missing or was replaced
    meanwhile, HostCannot if it is not a regular file, NoSpace if the disk is too full for a copy.
    """
    with os_errors(f"link {source} to {destination}"):
        before = os.lstat(source)
        if not stat.S_ISREG(before.st_mode):
            raise HostCannot(f"{source} is not a regular file", hint="check what replaced it in the data directory")
        try:
            os.link(source, destination, follow_symlinks=False)
        except OSError as error:
            reason = _REASONS.get(error.errno or 0)
            if reason is None:
                raise
            result = clone_file(Path(source), Path(destination), mode=IMMUTABLE)
            return LinkResult(Sharing.COPY, reason, result.bytes_written)
        after = os.lstat(destination)
        if (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
            Path(destination).unlink()
            raise IntegrityError(
                f"{source} was replaced while it was linked: inode {before.st_ino} became {after.st_ino}",
                hint="try again; if it repeats, something else writes to the data directory",
            )
        if stat.S_IMODE(after.st_mode) != IMMUTABLE:
            Path(destination).chmod(IMMUTABLE)
        return LinkResult(Sharing.HARDLINK, "", 0)
