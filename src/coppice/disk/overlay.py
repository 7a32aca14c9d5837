"""Overlay disks: a small pristine ext4 per size, made once and cloned for each instance.

A clone on a file system without reflinks copies what the pristine image has allocated, and a fork copies what its
source's overlay has. So the recipe keeps metadata small and together: no backup superblocks, no resize inode, one
flexible block group for all bitmaps, inode tables left as holes (the guest mounts with `noinit_itable`), a 4 MiB
journal that is a hole until used. The result depends on nothing but size and recipe: fixed UUID, hash seed and time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from coppice.disk.atomic import os_errors, publish, temporary_beside
from coppice.disk.clone import CloneResult, clone_file
from coppice.disk.link import IMMUTABLE
from coppice.errors import HostCannot, MissingTool, UsageError
from coppice.model import MIB

SMALLEST_BYTES = 16 * MIB
LARGEST_BYTES = 16 << 40  # the recipe has no 64-bit block numbers

_UUID = "c0bb1ce0-0000-4000-8000-000000000001"
_EPOCH = "1700000000"
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
_ENVIRONMENT = {
    "MKE2FS_CONFIG": "/dev/null",  # the host's defaults would add features
    "E2FSPROGS_FAKE_TIME": _EPOCH,
    "LC_ALL": "C",
    "PATH": "/usr/sbin:/sbin:/usr/bin:/bin",
}
_MKFS_DEADLINE_S = 120.0
_OUTPUT_LIMIT = 4000

_SUPERBLOCK_OFFSET = 1024
_INCOMPAT_OFFSET = 0x60  # s_feature_incompat, little endian
_INCOMPAT_RECOVER = 0x4  # the journal holds transactions that were not written back


class FsckResult(NamedTuple):
    """`clean` is what e2fsck says once the journal is replayed, where it had to be; `output` is the end of its
    words."""

    clean: bool
    journal_replayed: bool
    output: str


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
                made = _run("mke2fs", "-q", "-F", *_RECIPE, str(temporary), deadline_s=_MKFS_DEADLINE_S)
                if made.returncode != 0:
                    raise HostCannot(
                        f"mke2fs failed with status {made.returncode}: {_tail(made)}",
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


def fsck(path: Path, *, deadline_s: float = 300.0) -> FsckResult:
    """Check an ext4 image that nothing writes to; the image itself is only read.

    An image that was not frozen before it was captured has a journal to replay first, which the guest's mount would do;
    that is done on a temporary clone beside it.

    Raises MissingTool, HostCannot if e2fsck itself fails or exceeds the deadline, NoSpace.
    """
    if not _needs_recovery(path):
        return _check(path, deadline_s, replayed=False)
    copy = temporary_beside(path)
    try:
        clone_file(path, copy, sync=False)
        _run("e2fsck", "-y", "-E", "journal_only", str(copy), deadline_s=deadline_s)
        return _check(copy, deadline_s, replayed=True)
    finally:
        copy.unlink(missing_ok=True)


def _check(path: Path, deadline_s: float, *, replayed: bool) -> FsckResult:
    done = _run("e2fsck", "-f", "-n", str(path), deadline_s=deadline_s)
    # Bit 4: errors left uncorrected, also those that keep e2fsck from going on. Else any bit is a failure to check at all.
    if done.returncode != 0 and not done.returncode & 4:
        raise HostCannot(
            f"e2fsck could not check {path}, status {done.returncode}: {_tail(done)}",
            hint="see that the file is an ext4 image and can be read",
        )
    return FsckResult(done.returncode == 0, replayed, _tail(done))


def _needs_recovery(path: Path) -> bool:
    with os_errors(f"read {path}"), path.open("rb") as file:
        file.seek(_SUPERBLOCK_OFFSET + _INCOMPAT_OFFSET)
        return bool(int.from_bytes(file.read(4), "little") & _INCOMPAT_RECOVER)


def _run(tool: str, *arguments: str, deadline_s: float) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which(tool, path=_ENVIRONMENT["PATH"])
    if program is None:
        raise MissingTool(f"{tool} is not installed", hint="install the package e2fsprogs")
    try:
        return subprocess.run(
            (program, *arguments),
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HostCannot(
            f"{tool} did not finish within {deadline_s:.0f} s",
            hint="see whether the disk is overloaded, then try again",
        ) from error


def _tail(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stdout.decode("utf-8", "replace").strip()[-_OUTPUT_LIMIT:]
