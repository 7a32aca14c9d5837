"""The disk of a volume: an ext4 file system of its own, which is filled by the machines that it is attached to, or starts with a copy of a directory.

Unlike an overlay it is meant to be kept for long and is never cloned: it has the usual backups of its superblock, a journal that fits its size, and a UUID of
its own. Inode tables and journal are holes until they are used, so an empty one takes little room.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from coppice.disk.atomic import os_errors, publish, temporary_beside
from coppice.disk.ext4 import run_tool, tail
from coppice.errors import HostCannot, UsageError
from coppice.model import MIB

_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
_OPTIONS = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"
_RECIPE = (
    *("-O", _FEATURES),
    *("-b", "4096", "-I", "256", "-i", "16384", "-m", "0"),
)
_MKFS_DEADLINE_S = 300.0
_COPIED_PER_S = 10 * MIB


def empty_bytes(size_bytes: int) -> int:
    """What an empty volume may take, estimated from above: 0.7 MiB were seen for 1 GiB, 16 MiB for 1 TiB."""
    return 4 * MIB + (size_bytes >> 14)


def create(
    path: Path, size_bytes: int, *, content: Path | None = None, finish: Callable[[Path], None] = lambda _: None
) -> None:
    """Make a file system of that size at `path`, mode 0600, durably: empty, or with what is in the directory `content`.

    `finish` is called with the file before it has its name, and may change it.

    Raises UsageError where the content does not fit, MissingTool, NoSpace or HostCannot; no temporary file is left behind.
    """
    with os_errors(f"make the volume {path}"):
        temporary = temporary_beside(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            options: tuple[str, ...] = ("-E", _OPTIONS)
            deadline_s = _MKFS_DEADLINE_S
            if content is not None:
                options = ("-E", f"{_OPTIONS},no_copy_xattrs", "-d", str(content))
                deadline_s += size_bytes / _COPIED_PER_S
            made = run_tool("mke2fs", "-q", "-F", *_RECIPE, *options, str(temporary), deadline_s=deadline_s)
            if made.returncode != 0 and b"Could not allocate" in made.stdout:
                raise UsageError(
                    f"what is to be copied does not fit on a volume of {size_bytes} bytes: {tail(made)}",
                    hint="give the volume a larger size: it takes room only as it is filled",
                )
            if made.returncode != 0:
                raise HostCannot(
                    f"mke2fs failed with status {made.returncode}: {tail(made)}",
                    hint="see that e2fsprogs 1.43 or later is installed and the disk is not full",
                )
            finish(temporary)
            os.fsync(descriptor)
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
