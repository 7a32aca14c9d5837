"""Overlay disks: a small pristine ext4 per size, made once and cloned for each instance, and an
empty layer of each size and format for forks.

On a file system without reflinks, a clone copies the allocated blocks of the pristine image. So the recipe keeps metadata small and contiguous: no backup
superblocks, no resize inode, one flexible block group for all bitmaps, inode tables left as holes
(the guest mounts with `noinit_itable`), a 4 MiB journal that is a hole until used. The UUID, hash
seed and time are fixed, so the result depends only on size and recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from coppice.content.store import ContentStore
from coppice.errors import UsageError
from coppice.linux.clone import CloneResult, clone_file
from coppice.linux.e2fs import make_file_system
from coppice.linux.files import os_errors
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
    """Pristine overlay images, cached in the directory `root` and cloned per instance.

    Safe among processes.
    """

    def __init__(self, root: Path) -> None:
        self.content = ContentStore(root)

    def path(self, size_bytes: int) -> Path:
        """Return the path of the pristine image of that size, which need not exist.

        A changed recipe changes the name.
        """
        digest = hashlib.sha256("\0".join(_RECIPE).encode()).hexdigest()[:12]
        return self.content.root / f"ext4-{size_bytes}-{digest}.raw"

    def pristine(self, size_bytes: int) -> Path:
        """Return the pristine image of that size; make it if it does not exist.

        Raises UsageError for a size that ext4 does not support here, MissingTool, NoSpace or
        HostCannot.
        """
        if not SMALLEST_BYTES <= size_bytes < LARGEST_BYTES or size_bytes % 4096:
            raise UsageError(
                f"cannot make an overlay disk of {size_bytes} bytes",
                hint=f"choose a multiple of 4096 from {SMALLEST_BYTES} to below {LARGEST_BYTES} bytes",
            )
        final = self.path(size_bytes)
        with os_errors(f"make the overlay disk {final}"):
            return self.content.make(
                final.name, lambda path: make_file_system(path, size_bytes, *_RECIPE, deadline_s=_MKFS_DEADLINE_S)
            )

    def layer_path(self, size_bytes: int, layer_format: str) -> Path:
        """Return the path of the empty layer of that size and format, which need not exist."""
        return self.content.root / f"layer-{size_bytes}-{layer_format}"

    def create_layer(
        self, size_bytes: int, layer_format: str, make: Callable[[Path, int], None], destination: Path
    ) -> CloneResult:
        """Clone the empty layer of that size and format to `destination`, mode 0600; not synced.

        :param make: makes an empty layer of a size at a new path
        Raises what `make` and `clone_file` raise.
        """

        def fill(path: Path) -> None:
            full = path.with_suffix(".full")
            make(full, size_bytes)
            clone_file(full, path, reflink=False)  # its zeros become holes

        layer = self.content.make(self.layer_path(size_bytes, layer_format).name, fill)
        return clone_file(layer, destination, sync=False)

    def create(self, size_bytes: int, destination: Path) -> CloneResult:
        """Clone the pristine image of that size to `destination`, mode 0600.

        Raises what `pristine` and `clone_file` raise.
        """
        return clone_file(self.pristine(size_bytes), destination)
