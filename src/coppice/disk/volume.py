"""The disk of a volume: an ext4 file system of its own, which is filled by the machines that it is attached to.

Unlike an overlay it is meant to be kept for long and is never cloned: it has the usual backups of its superblock, a journal that fits its size, and a UUID of
its own. Inode tables and journal are holes until they are used, so an empty one takes little room.
"""

from __future__ import annotations

import os
from pathlib import Path

from coppice.disk.atomic import os_errors, publish, temporary_beside
from coppice.disk.ext4 import run_tool, tail
from coppice.errors import HostCannot
from coppice.model import MIB

_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
_RECIPE = (
    *("-O", _FEATURES, "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"),
    *("-b", "4096", "-I", "256", "-i", "16384", "-m", "0"),
)
_MKFS_DEADLINE_S = 300.0


def empty_bytes(size_bytes: int) -> int:
    """What an empty volume may take, estimated from above: 0.7 MiB were seen for 1 GiB, 16 MiB for 1 TiB."""
    return 4 * MIB + (size_bytes >> 14)


def create(path: Path, size_bytes: int) -> None:
    """Make an empty file system of that size at `path`, mode 0600, durably.

    Raises MissingTool, NoSpace or HostCannot; no temporary file is left behind.
    """
    with os_errors(f"make the volume {path}"):
        temporary = temporary_beside(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            made = run_tool("mke2fs", "-q", "-F", *_RECIPE, str(temporary), deadline_s=_MKFS_DEADLINE_S)
            if made.returncode != 0:
                raise HostCannot(
                    f"mke2fs failed with status {made.returncode}: {tail(made)}",
                    hint="see that e2fsprogs 1.43 or later is installed and the disk is not full",
                )
            os.fsync(descriptor)
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
