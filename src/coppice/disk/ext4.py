"""ext4 images as files: the tools of e2fsprogs, run over what nothing else writes to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from coppice.disk.atomic import os_errors, temporary_beside
from coppice.disk.clone import clone_file
from coppice.errors import HostCannot, IntegrityError, MissingTool

_EPOCH = "1700000000"
_ENVIRONMENT = {
    "MKE2FS_CONFIG": "/dev/null",  # the host's defaults would add features
    "E2FSPROGS_FAKE_TIME": _EPOCH,
    "LC_ALL": "C",
    "PATH": "/usr/sbin:/sbin:/usr/bin:/bin",
}
_OUTPUT_LIMIT = 4000
_LAUNCHERS = ("setpriv", "prlimit")
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # any other is the program's own, for what it has met
_ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # the kernel ends it with the thread that started it

_SUPERBLOCK_OFFSET = 1024
_INCOMPAT_OFFSET = 0x60  # s_feature_incompat, little endian
_INCOMPAT_RECOVER = 0x4  # the journal holds transactions that were not written back


class NotFinished(HostCannot):
    """A tool ran into its deadline, or was killed: nothing is known of the image."""


class FsckResult(NamedTuple):
    """`clean` is what e2fsck says once the journal is replayed, where it had to be; `output` is the end of its
    words."""

    clean: bool
    journal_replayed: bool
    output: str


def fsck(path: Path, *, deadline_s: float = 300.0) -> FsckResult:
    """Check an ext4 image that nothing writes to; the image itself is only read.

    An image that was not frozen before it was captured has a journal to replay first, which the guest's mount would do;
    that is done on a temporary clone beside it.

    Raises MissingTool, HostCannot if e2fsck itself fails, NotFinished beyond the deadline, NoSpace.
    """
    if not needs_recovery(path):
        return _check(path, deadline_s, replayed=False)
    copy = temporary_beside(path)
    try:
        clone_file(path, copy, sync=False)
        run_tool(
            "e2fsck", "-y", "-E", "journal_only", str(copy), deadline_s=deadline_s, launcher=_within_its_size(copy)
        )
        return _check(copy, deadline_s, replayed=True)
    finally:
        copy.unlink(missing_ok=True)


def replay_journal(path: Path, *, deadline_s: float = 300.0) -> bool:
    """Write back what the journal of an ext4 image holds, as a mount for writing would; tell whether there was anything.

    Nothing else may use the image meanwhile. Interrupted, it can be done again; it ends with this process, so that nobody who takes the image
    afterwards meets it.

    Raises MissingTool, IntegrityError if it cannot be replayed, NotFinished beyond the deadline.
    """
    if not needs_recovery(path):
        return False
    launcher = (*_ENDS_WITH_US, *_within_its_size(path))
    done = run_tool("e2fsck", "-y", "-E", "journal_only", str(path), deadline_s=deadline_s, launcher=launcher)
    if needs_recovery(path):
        raise IntegrityError(
            f"the journal of {path} cannot be replayed: {tail(done)}",
            hint="attach it for writing, and repair it there with e2fsck",
        )
    with os_errors(f"make {path} durable"), path.open("rb") as file:
        os.fsync(file.fileno())
    return True


def _within_its_size(path: Path) -> tuple[str, ...]:
    """What keeps a program from making any file larger than this one is. A guest writes what it likes into its journal: e2fsck would write the
    blocks that it names wherever they are, though they are far beyond the end of the file system (seen with 1.47.0)."""
    size = path.stat().st_size
    return ("prlimit", f"--fsize={size}:{size}", "--")


def _check(path: Path, deadline_s: float, *, replayed: bool) -> FsckResult:
    done = run_tool("e2fsck", "-f", "-n", str(path), deadline_s=deadline_s)
    # Bit 4: errors left uncorrected, also those that keep e2fsck from going on. Else any bit is a failure to check at all.
    if done.returncode != 0 and not done.returncode & 4:
        raise HostCannot(
            f"e2fsck could not check {path}, status {done.returncode}: {tail(done)}",
            hint="see that the file is an ext4 image and can be read",
        )
    return FsckResult(done.returncode == 0, replayed, tail(done))


def needs_recovery(path: Path) -> bool:
    """Whether the journal of an ext4 image holds what was not written back.

    Raises IntegrityError (no such file) or HostCannot.
    """
    with os_errors(f"read {path}"), path.open("rb") as file:
        file.seek(_SUPERBLOCK_OFFSET + _INCOMPAT_OFFSET)
        return bool(int.from_bytes(file.read(4), "little") & _INCOMPAT_RECOVER)


def run_tool(
    tool: str, *arguments: str, deadline_s: float, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[bytes]:
    """Run a program of e2fsprogs to its end, whatever its status: the same on every host. A `launcher` becomes that program.

    Raises MissingTool, or NotFinished beyond the deadline or where somebody kills it.
    """
    for program, package in ((tool, "e2fsprogs"), *((name, "util-linux") for name in launcher if name in _LAUNCHERS)):
        if shutil.which(program, path=_ENVIRONMENT["PATH"]) is None:
            raise MissingTool(f"{program} is not installed", hint=f"install the package {package}")
    try:
        done = subprocess.run(
            (*launcher, tool, *arguments),
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NotFinished(
            f"{tool} did not finish within {deadline_s:.0f} s",
            hint="see whether the disk is overloaded, then try again",
        ) from error
    if -done.returncode in _FROM_OUTSIDE:
        raise NotFinished(
            f"{tool} was ended by {signal.Signals(-done.returncode).name} before it had finished",
            hint="see in the kernel's log whether memory ran out, then try again",
        )
    return done


def tail(done: subprocess.CompletedProcess[bytes]) -> str:
    """The end of what a program said."""
    return done.stdout.decode("utf-8", "replace").strip()[-_OUTPUT_LIMIT:]
