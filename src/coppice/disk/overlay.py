"""Overlay disks: a small pristine ext4 per size, made once and cloned for each instance.

A clone on a file system without reflinks copies what the pristine image has allocated, and a fork copies what its
source's overlay has. So the recipe keeps metadata small and together: no backup superblocks, no resize inode, one
flexible block group for all bitmaps, inode tables left as holes (the guest mounts with `noinit_itable`), a 4 MiB
journal that is a hole until used. The result depends on nothing but size and recipe: fixed UUID, hash seed and time.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from coppice.disk.atomic import os_errors, publish, temporary_beside
from coppice.disk.clone import CloneResult, clone_file
from coppice.disk.ext4 import run_tool, tail
from coppice.disk.link import IMMUTABLE
from coppice.errors import HostCannot, UsageError
from coppice.model import MIB

SMALLEST_BYTES = 16 * MIB
LARGEST_BYTES = 16 << 40  # the recipe has no 64-bit block numbers

_UUID = "c0bb1ce0-0000-4000-8000-000000000001"
_FEATURES = (
    "none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super2,large_file,huge_file,dir_nlink,"
    "extra_isize,metadata_csum"
)
_EXTENDED = (
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard,num_backup_sb=0,root_owner=0:0,packed_meta_blocks=1,"
    f"hash_seed={_UUID}"
)
_RECIPE = (
    *("-O", _FEATURES, "-E", _EXTENDED, "-U", _UUID),
    *("-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-J", "size=4", "-G", "4096"),
)
_MKFS_DEADLINE_S = 120.0


class OverlayStore:
    """Pristine overlay images, cached in the directory `root` and cloned per instance; safe among processes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, size_bytes: int) -> Path:
        """Where the pristine image of that size is or will be; a changed recipe changes the name."""
        digest = hashlib.sha256("\0".join(_RECIPE).encode()).hexdigest()[:12]
        return self._root / f"ext4-{size_bytes}-{digest}.raw"

    def pristine(self, size_bytes: int) -> Path:
        """Return the pristine image of that size, made now if it is not there.

        Two processes may make it at once: both make the same bytes, and the later rename wins.

        Raises UsageError for a size that ext4 cannot have here, MissingTool, NoSpace or HostCannot.
        """
        if not SMALLEST_BYTES <= size_bytes < LARGEST_BYTES or size_bytes % 4096:
            raise UsageError(
                f"An overlay disk of {size_bytes} bytes cannot be made",
                hint=f"choose a multiple of 4096 from {SMALLEST_BYTES} to below {LARGEST_BYTES} bytes",
            )
        final = self.path(size_bytes)
        if final.exists():
            return final
        with os_errors(f"make the overlay disk {final}"):
            self._root.mkdir(parents=True, exist_ok=True)
            temporary = temporary_beside(final)
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size_bytes)
                made = run_tool("mke2fs", "-q", "-F", *_RECIPE, str(temporary), deadline_s=_MKFS_DEADLINE_S)
                if made.returncode != 0:
                    raise HostCannot(
                        f"mke2fs failed with status {made.returncode}: {tail(made)}",
                        hint="see that e2fsprogs 1.43 or later is installed and the disk is not full",
                    )
                os.fchmod(fd, IMMUTABLE)
                os.fsync(fd)
                publish(temporary, final)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
        return final

    def create(self, size_bytes: int, destination: Path) -> CloneResult:
        """Clone the pristine image of that size to `destination`, mode 0600.

        Raises what `pristine` and `clone_file` raise.
        """
        return clone_file(self.pristine(size_bytes), destination)
