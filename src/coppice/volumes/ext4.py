"""Check and repair ext4 image files that nothing else writes to, by the tools of e2fsprogs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from coppice.errors import HostCannot, IntegrityError
from coppice.linux.clone import clone_file
from coppice.linux.e2fs import run_e2fs, tail
from coppice.linux.files import os_errors, sync, temporary_beside

_DEADLINE_S = 300.0
_SUPERBLOCK_OFFSET = 1024
_INCOMPAT_OFFSET = 0x60  # s_feature_incompat, little endian
_INCOMPAT_RECOVER = 0x4  # the journal holds transactions that were not written back


class FsckResult(NamedTuple):
    """`clean` is e2fsck's verdict after it replayed the journal, if necessary; `output` is the end
    of its output.
    """

    clean: bool
    output: str


def fsck(path: Path) -> FsckResult:
    """Check an ext4 image that nothing writes to; only read the image.

    An image that was not frozen before its capture has a journal to replay first, as the guest's
    mount would do. That is done on a temporary clone in the same directory.

    Raises MissingTool, HostCannot if e2fsck itself fails, NotFinished beyond the deadline, NoSpace.
    """
    if not needs_recovery(path):
        return _check(path)
    copy = temporary_beside(path)
    try:
        clone_file(path, copy, sync=False)
        run_e2fs(
            "e2fsck", "-y", "-E", "journal_only", str(copy), deadline_s=_DEADLINE_S, launcher=_within_its_size(copy)
        )
        return _check(copy)
    finally:
        copy.unlink(missing_ok=True)


def replay_journal(path: Path) -> bool:
    """Write back the journal of an ext4 image, as a writable mount would; return whether it had
    transactions.

    Nothing else may use the image meanwhile. After an interruption it can be repeated. The tool
    ends with this process, so it cannot overlap with a later user of the image.

    Raises MissingTool, IntegrityError if the journal cannot be replayed, NotFinished beyond the
    deadline.
    """
    if not needs_recovery(path):
        return False
    launcher = _within_its_size(path)
    done = run_e2fs("e2fsck", "-y", "-E", "journal_only", str(path), deadline_s=_DEADLINE_S, launcher=launcher)
    if needs_recovery(path):
        raise IntegrityError(
            f"cannot replay the journal of {path}: {tail(done)}",
            hint="attach the volume for writing, and repair it in the guest with e2fsck",
        )
    with os_errors(f"make {path} durable"):
        sync(path)
    return True


def _within_its_size(path: Path) -> tuple[str, ...]:
    """Return a launcher that limits files to the size of this one.

    A guest controls its journal: e2fsck would write the blocks that the journal names, even far
    beyond the end of the file system (seen with 1.47.0).
    """
    size = path.stat().st_size
    return ("prlimit", f"--fsize={size}:{size}", "--")


def _check(path: Path) -> FsckResult:
    done = run_e2fs("e2fsck", "-f", "-n", str(path), deadline_s=_DEADLINE_S)
    # Bit 4 means errors left uncorrected, including those that stop e2fsck. Other bits alone mean
    # that the check itself failed.
    if done.status != 0 and not done.status & 4:
        raise HostCannot(
            f"e2fsck could not check {path}, status {done.status}: {tail(done)}",
            hint="check that the file is a readable ext4 image",
        )
    return FsckResult(done.status == 0, tail(done))


def needs_recovery(path: Path) -> bool:
    """Return whether the journal of an ext4 image has transactions to write back.

    Raises IntegrityError (no such file) or HostCannot.
    """
    with os_errors(f"read {path}"), path.open("rb") as file:
        file.seek(_SUPERBLOCK_OFFSET + _INCOMPAT_OFFSET)
        return bool(int.from_bytes(file.read(4), "little") & _INCOMPAT_RECOVER)
